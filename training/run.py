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
from accelerate.utils import ProjectConfiguration, parse_choice_from_env

from training import checkpoint
from training.artifact import fingerprint_base
from training.base import BaseFiles, resolve_base
from training.chat import TrainExample
from training.checkpoint import CheckpointError
from training.config import TrainConfig, resolved_toml
from training.data_gate.report import build_report
from training.hollow import hollow_base
from training.model import (
    ModelError,
    PackLoss,
    add_lora,
    check_loss,
    compute_dtype,
    load_base,
    load_tokenizer,
    nf4_config,
    refuse_unsupported,
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
from training.ways import Ways, choose_ways


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
    ways: Ways
    sharding: Sharding | None = None  # None: every process has a whole model

    @property
    def network(self) -> PackLoss:
        """The loss without what launching wraps around it: DDP's own forward pass waits for every process."""
        network: PackLoss = self.accelerator.unwrap_model(self.loss)
        return network


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
    dtype = compute_dtype(config.model.dtype, accelerator.device)
    processes = accelerator.num_processes
    ways = choose_ways(
        config, dtype, accelerator.device, steps=total, processes=processes, sharded=sharding is not None
    )
    if sharding is None:
        loss: Any = PackLoss(_model(config, base, accelerator.device, ways), config.optim.neftune_alpha)
        take_ways(loss, config, ways)
    else:
        loss = _sharded(config, base, ways, accelerator, sharding)
    model = loss.model
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
    parts = (model, loss, optimizer, total, inputs, base, tokenizer, budget, ways, sharding)
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
    model = _model(run.config, run.base, run.accelerator.device, run.ways)
    set_trained_weights(model, weights)
    return replace(run, peft_model=model, loss=PackLoss(model), sharding=None)


def take_ways(loss: PackLoss, config: TrainConfig, ways: Ways) -> None:
    if ways.compile:
        loss.compile_blocks()
    if ways.graphs:
        optim = config.optim
        loss.use_graphs(
            most_tokens=min(optim.micro_batch_tokens, optim.batch_size * config.data.cutoff),
            most_rows=optim.batch_size,
            longest_row=config.data.cutoff,
        )


def _model(config: TrainConfig, base: BaseFiles, device: torch.device, ways: Ways) -> Any:
    dtype = compute_dtype(config.model.dtype, device)
    return _adapted(
        load_base(base.directory, config.model.quantisation, dtype, device, keep_dense=ways.dense), config, ways
    )


def _sharded(
    config: TrainConfig, base: BaseFiles, ways: Ways, accelerator: Accelerator, sharding: Sharding
) -> PackLoss:
    """Returns the network spread over all processes, none of which ever holds the whole of it."""
    device, dtype = accelerator.device, compute_dtype(config.model.dtype, accelerator.device)
    nf4 = nf4_config(dtype, storage=dtype) if config.model.quantisation == "nf4" else None
    hollow = hollow_base(base.directory, dtype, device, nf4)
    refuse_unsupported(hollow.model.config)
    hollow.model.config.use_cache = False
    loss = PackLoss(_adapted(hollow.model, config, ways), config.optim.neftune_alpha)
    shard(loss, hollow, dtype, device, accelerator.num_processes, sharding)
    check_loss(loss)
    return loss


def _adapted(frozen: Any, config: TrainConfig, ways: Ways) -> Any:
    model = add_lora(frozen, config.lora, config.run.seed)
    if ways.recompute:
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
    heed_launcher(precision, config.model.dtype, dtype)
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


def heed_launcher(precision: str, name: str, dtype: torch.dtype) -> None:
    """Raises ModelError where the launcher asks for another precision than the recipe; tells where "no" is not kept.

    Its "no" may be nobody's wish: the launcher says so too where it is asked for nothing.
    """
    asked = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "")
    found = f"model.dtype = {name!r}, which is {str(dtype).removeprefix('torch.')} here"
    if asked not in ("", "no", precision):
        raise ModelError(
            f"--mixed_precision {asked} (ACCELERATE_MIXED_PRECISION) is not {found}: the recipe alone decides; set its "
            "model.dtype, or launch with --mixed_precision no"
        )
    if asked == "no" != precision and this_process().is_main_process:
        print(f"the launcher's mixed precision 'no' does not apply: {found}", file=sys.stderr, flush=True)


def _digest(examples: Iterable[TrainExample]) -> str:
    """Returns the sha256 over the rendered rows."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(array("q", (len(example.input_ids), *example.input_ids, *example.labels)).tobytes())
    return digest.hexdigest()
