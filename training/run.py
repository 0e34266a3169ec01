"""A run's parts, put together from its recipe: device, model, optimizer, data."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from training import checkpoint
from training.artifact import fingerprint_base
from training.base import BaseFiles, resolve_base
from training.config import TrainConfig, resolved_toml
from training.model import (
    ModelError,
    PackLoss,
    add_lora,
    compute_dtype,
    load_base,
    load_tokenizer,
    use_checkpointing,
)
from training.optimizer import make_optimizer
from training.prepare import Prepared, prepare
from training.schedule import total_steps
from training.trackers import require_trackers

_ROOMY_GIB = 40  # a 7B model's activations for 4,096 tokens take about 30 GiB beside its 6 GiB of weights


@dataclass(slots=True)
class Run:
    """What the steps of one run share."""

    config: TrainConfig
    out: Path
    data: Prepared
    accelerator: Accelerator
    peft_model: Any  # holds the adapter
    loss: Any  # PackLoss as accelerate prepared it
    optimizer: Any
    total: int
    inputs: dict[str, str]
    base: BaseFiles
    tokenizer: Any
    micro_batch_tokens: int  # the recipe's, until memory runs out


def assemble(config: TrainConfig, out: Path, cache: Path, data: Prepared | None = None) -> Run:
    """Reads the data, if not given, before the model: bad rows cost no waiting. Raises ModelError, DataError."""
    accelerator = _accelerator(config, out)
    with accelerator.local_main_process_first():
        base = resolve_base(config.model, cache)
    tokenizer = load_tokenizer(base.directory)
    quiet = not accelerator.is_main_process
    data = data or prepare(tokenizer, config.data, config.run.eval_rows, quiet=quiet)
    dtype = compute_dtype(config.model.dtype, accelerator.device)
    model = add_lora(
        load_base(base.directory, config.model.quantisation, dtype, accelerator.device), config.lora, config.run.seed
    )
    if wants_recompute(config, accelerator.device):
        use_checkpointing(model)
    optimizer = make_optimizer(config.optim, [p for p in model.parameters() if p.requires_grad])
    loss, optimizer = accelerator.prepare(PackLoss(model, config.optim.neftune_alpha), optimizer)
    inputs = {"recipe": _digest(resolved_toml(config)), "data": data.facts.sha256}
    inputs["base"] = fingerprint_base(base.directory)
    total = total_steps(len(data.train), config.optim)
    budget = config.optim.micro_batch_tokens
    return Run(config, out, data, accelerator, model, loss, optimizer, total, inputs, base, tokenizer, budget)


def capture(run: Run, step: int) -> checkpoint.Checkpoint:
    """Returns what `resume` needs after `step` steps."""
    scaler = run.accelerator.scaler
    return checkpoint.Checkpoint(
        step,
        run.inputs,
        get_peft_model_state_dict(run.peft_model),
        run.optimizer.state_dict(),
        dict(scaler.state_dict()) if scaler is not None else {},
        run.micro_batch_tokens,
    )


def resume(run: Run) -> int:
    """Puts the newest whole checkpoint's state into `run` and returns its step; 0 where there is none.

    Raises CheckpointError where that checkpoint was made from another recipe, data set or base.
    """
    found = checkpoint.newest(run.out / "checkpoints")
    if found is None:
        return 0
    state = checkpoint.load(found, run.inputs)
    set_peft_model_state_dict(run.peft_model, dict(state.weights))
    run.optimizer.load_state_dict(dict(state.optimizer))
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(dict(state.scaler))
    run.micro_batch_tokens = state.micro_batch_tokens or run.micro_batch_tokens
    print(f"resuming after step {state.step} from {found}", file=sys.stderr, flush=True)
    return state.step


def _accelerator(config: TrainConfig, out: Path) -> Accelerator:
    require_trackers(config.run.trackers)
    on_cpu = not torch.cuda.is_available()
    device = PartialState(cpu=on_cpu).device
    dtype = compute_dtype(config.model.dtype, device)
    if config.optim.optimizer == "paged_adamw_8bit" and on_cpu:
        raise ModelError("optim.optimizer = 'paged_adamw_8bit' needs a CUDA device; use 'adamw' on a CPU")
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        log_with=list(config.run.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "trackers")),
    )
    if config.optim.batch_size < accelerator.num_processes:
        raise ModelError(
            f"optim.batch_size = {config.optim.batch_size} rows cannot be shared by {accelerator.num_processes} "
            "processes; raise it to at least one row each"
        )
    return accelerator


def wants_recompute(config: TrainConfig, device: torch.device) -> bool:
    """Whether activations are recomputed: as the recipe says, else on a GPU with little memory."""
    if config.run.gradient_checkpointing != "auto":
        return config.run.gradient_checkpointing == "on"
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).total_memory < _ROOMY_GIB * 2**30


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
