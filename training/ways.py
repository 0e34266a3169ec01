"""The ways a run computes its steps: recomputed activations, compiled blocks, CUDA graphs, dense weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training import attention
from training.config import TrainConfig
from training.errors import TrainingError

_LONG_STEPS = 1000  # optimizer steps: on an H100 compiling takes 90 s, and a step is 0.1 s shorter for it
_ROOMY_GIB = 40  # a 7B model's activations for 4,096 tokens take about 30 GiB beside its 6 GiB of weights


class WaysError(TrainingError):
    """A way that the recipe asks for and that this run cannot take; names the field and the remedy."""


@dataclass(frozen=True, slots=True)
class Ways:
    """All give the same numbers but for rounding and dropout's draws; they differ in time and memory."""

    recompute: bool  # activations in the backward pass
    compile: bool  # the decoder's blocks
    graphs: bool  # replay the decoder's kernels
    dense: bool  # NF4 weights are made dense once, when loaded


def choose_ways(
    config: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    steps: int,
    processes: int = 1,
    sharded: bool = False,
) -> Ways:
    """Returns what the recipe says, and where it says `auto` what pays. Raises WaysError.

    `dtype` is that of the arithmetic; `steps` are the run's optimizer steps. A sharded model's blocks are gathered
    when they run: nothing of them is kept or compiled.
    """
    recompute = wants_recompute(config, device)
    if sharded:
        return Ways(recompute, compile=False, graphs=False, dense=False)
    compiled = _compile(config, dtype, device, steps)
    hindered = _without_graphs(config, dtype, device, recompute=recompute, processes=processes)
    if config.run.cuda_graphs == "on" and hindered:
        raise WaysError(f"run.cuda_graphs = 'on' does not go with {hindered}; change that, or take 'auto'")
    graphs = not hindered and (config.run.cuda_graphs == "on" or (config.run.cuda_graphs == "auto" and compiled))
    return Ways(recompute, compiled, graphs, _dense(config, compiled=compiled, recompute=recompute))


def wants_recompute(config: TrainConfig, device: torch.device) -> bool:
    """Whether activations are recomputed: as the recipe says, else on a GPU with little memory."""
    if config.run.gradient_checkpointing != "auto":
        return config.run.gradient_checkpointing == "on"
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).total_memory < _ROOMY_GIB * 2**30


def _compile(config: TrainConfig, dtype: torch.dtype, device: torch.device, steps: int) -> bool:
    if config.run.compile != "auto":
        return config.run.compile == "on"
    return steps >= _LONG_STEPS and attention.takes_bounds(dtype, device)


def _without_graphs(
    config: TrainConfig, dtype: torch.dtype, device: torch.device, *, recompute: bool, processes: int
) -> str | None:
    """Returns what a graph cannot hold: it repeats the same kernels on the same memory, with nothing between them."""
    hindrances = {
        f"the arithmetic here, {dtype} on {device.type}: attention over rows of any length is needed, 16 bits from "
        "Ampere on": not attention.takes_bounds(dtype, device),
        "run.gradient_checkpointing (on here)": recompute,
        f"{processes} processes": processes > 1,
        f"optim.neftune_alpha = {config.optim.neftune_alpha}": config.optim.neftune_alpha is not None,
        "lora.dora = true": config.lora.dora,
    }
    return next((name for name, present in hindrances.items() if present), None)


def _dense(config: TrainConfig, *, compiled: bool, recompute: bool) -> bool:
    """Compiled blocks whose activations are kept hold dense weights from forward to backward anyway."""
    if config.model.quantisation != "nf4":
        return False
    if config.model.keep_dense != "auto":
        return config.model.keep_dense == "on"
    return compiled and not recompute
