"""A run's parts, put together from its recipe: device, model, optimizer, data."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration

from training import attention, checkpoint
from training.artifact import fingerprint_base
from training.base import BaseFiles, resolve_base
from training.chat import TrainExample
from training.checkpoint import CheckpointError
from training.config import TrainConfig, resolved_toml
from training.data_gate.report import build_report
from training.model import (
    ModelError,
    PackLoss,
    add_lora,
    compile_blocks,
    compute_dtype,
    load_base,
    load_tokenizer,
    use_checkpointing,
)
from training.optimizer import make_optimizer
from training.prepare import Prepared, prepare
from training.schedule import total_steps
from training.shard import (
    Sharding,
    require_shardable,
    set_trained_weights,
    shard,
    sharded_optimizer,
    trained_weights,
    whole_optimizer,
)
from training.trackers import require_trackers

_LONG_STEPS = 1000  # optimizer steps: on an H100 compiling takes 90 s, and a step is 0.1 s shorter for it
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
    sharding: Sharding | None = None  # None: every process has a whole model


def assemble(
    config: TrainConfig,
    out: Path,
    cache: Path,
    data: Prepared | None = None,
    *,
    report: bool = False,
    sharding: Sharding | None = None,
) -> Run:
    """Reads the data, if not given, before the model: bad rows cost no waiting. Raises ModelError, DataError.

    With `report` the first process examines the rows it reads, and `data.report` has what it found.
    """
    accelerator = _accelerator(config, out)
    if sharding is not None:
        require_shardable(config, accelerator.num_processes, compute_dtype(config.model.dtype, accelerator.device))
    with accelerator.local_main_process_first():
        base = resolve_base(config.model, cache)
    tokenizer = load_tokenizer(base.directory)
    quiet = not accelerator.is_main_process
    examine = partial(build_report, tokenizer=tokenizer, config=config) if report and not quiet else None
    if accelerator.num_processes > 1 and not quiet:
        print(f"{accelerator.num_processes} processes share the rows of each step", file=sys.stderr, flush=True)
    if config.data.turns == "last" and not quiet:
        print("data.turns = 'last': of each chat the last reply alone is trained", file=sys.stderr)
    data = data or prepare(tokenizer, config.data, config.run.eval_rows, quiet=quiet, report=examine)
    total = total_steps(len(data.train), config.optim)
    model = _model(config, base, accelerator.device, shardable=sharding is not None)
    if sharding is None and wants_compile(
        config, compute_dtype(config.model.dtype, accelerator.device), total, accelerator.device
    ):
        compile_blocks(model)
    loss = PackLoss(model, config.optim.neftune_alpha)
    if sharding is not None:
        shard(loss, accelerator.device, accelerator.num_processes, sharding)
    optimizer = accelerator.prepare(make_optimizer(config.optim, [p for p in loss.parameters() if p.requires_grad]))
    if sharding is None:
        loss = accelerator.prepare(loss)
    inputs = {
        "recipe": resolved_toml(config),
        "data": data.facts.sha256,
        "base": fingerprint_base(base.directory),
        "tokenizer or chat template": _digest(data.train),  # the same rows, rendered otherwise
    }
    budget = config.optim.micro_batch_tokens
    parts = (model, loss, optimizer, total, inputs, base, tokenizer, budget, sharding)
    return Run(config, out, data, accelerator, *parts)


def unsharded(run: Run) -> Run:
    """Returns the run as the first process goes on alone: with a whole model, read again where it was sharded.

    Every process must ask for it; in the others the run stays as it is.
    """
    if run.sharding is None:
        return run
    weights = trained_weights(run.peft_model)
    if not run.accelerator.is_main_process:
        return run
    run.peft_model = run.loss = run.optimizer = None  # gives back its memory first
    model = _model(run.config, run.base, run.accelerator.device, shardable=False)
    set_trained_weights(model, weights)
    return replace(run, peft_model=model, loss=PackLoss(model), sharding=None)


def _model(config: TrainConfig, base: BaseFiles, device: torch.device, *, shardable: bool) -> Any:
    dtype = compute_dtype(config.model.dtype, device)
    frozen = load_base(base.directory, config.model.quantisation, dtype, device, shardable=shardable)
    model = add_lora(frozen, config.lora, config.run.seed)
    if wants_recompute(config, device):
        use_checkpointing(model)
    return model


def capture(run: Run, step: int) -> checkpoint.Checkpoint:
    """Returns what `resume` needs after `step` steps; every process must ask for it where the model is sharded."""
    scaler = run.accelerator.scaler
    return checkpoint.Checkpoint(
        step,
        run.inputs,
        trained_weights(run.peft_model),
        whole_optimizer(run.optimizer.state_dict()),
        dict(scaler.state_dict()) if scaler is not None else {},
        run.micro_batch_tokens,
    )


def resume(run: Run) -> int:
    """Puts the newest whole checkpoint's state into `run` and returns its step; 0 where there is none.

    Raises CheckpointError where that checkpoint was made from other inputs, and where none is whole.
    """
    directory = run.out / "checkpoints"
    found, torn = checkpoint.newest(directory), checkpoint.torn(directory)
    if found is None and torn:
        raise CheckpointError(
            f"no checkpoint is whole: {'; '.join(torn)}. Restore what is missing, or begin again with --fresh"
        )
    if found is None:
        return 0
    for fault in torn:
        print(f"passed over, not whole: {fault}", file=sys.stderr)
    state = checkpoint.load(found, run.inputs)
    set_trained_weights(run.peft_model, state.weights)
    parameters = [weight for weight in run.peft_model.parameters() if weight.requires_grad]
    run.optimizer.load_state_dict(sharded_optimizer(state.optimizer, parameters))
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(dict(state.scaler))
    run.micro_batch_tokens = state.micro_batch_tokens or run.micro_batch_tokens
    print(f"resuming after step {state.step} from {found}", file=sys.stderr, flush=True)
    return state.step


def this_process() -> PartialState:
    """Returns which of the launched processes this one is, and its device."""
    return PartialState(cpu=not torch.cuda.is_available())


def _accelerator(config: TrainConfig, out: Path) -> Accelerator:
    require_trackers(config.run.trackers)
    on_cpu = not torch.cuda.is_available()
    device = this_process().device
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
    if accelerator.gradient_accumulation_steps != 1:  # accelerate would divide each pass's loss by it
        raise ModelError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS = {accelerator.gradient_accumulation_steps}: packs are "
            "accumulated up to optim.batch_size rows a step; unset it"
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


def wants_compile(config: TrainConfig, dtype: torch.dtype, total: int, device: torch.device) -> bool:
    """Whether blocks are compiled: as the recipe says, else where it pays and one program serves every pack."""
    if config.run.compile != "auto":
        return config.run.compile == "on"
    return total >= _LONG_STEPS and attention.takes_bounds(dtype, device)


def _digest(examples: Iterable[TrainExample]) -> str:
    """Returns the sha256 over the rendered rows."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(array("q", (len(example.input_ids), *example.input_ids, *example.labels)).tobytes())
    return digest.hexdigest()
