"""The training run, top to bottom: read, render, pack, step, save."""

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from training import checkpoint
from training.adapter import save_adapter
from training.artifact import AdapterManifest, read_manifest
from training.bad_batch import BAD_BATCH, NonFiniteError
from training.checkpoint import CheckpointError
from training.config import TrainConfig, resolved_toml
from training.data_gate.write import MARKDOWN_NAME, summary, write_report
from training.disk import disk_failures, sync
from training.lock import run_lock
from training.log import Progress, StepRecord, TrainLog, ValidationRecord, plot_loss
from training.prepare import Prepared
from training.run import Run, assemble, capture, resume, this_process, unsharded
from training.samples import open_samples, take_samples
from training.shard import Sharding, set_trained_weights
from training.split import write_held_out
from training.step import optimizer_step, validation_nll
from training.stop import TrainingStopped, stop_requests
from training.trackers import track, tracking

_UNFINISHED = ("held_out.jsonl.tmp", "loss.tmp.png", "train_log.tmp")  # what a killed process may leave


class Start(enum.Enum):
    """What to do where `out` holds an unfinished run."""

    NEW = "refuse"
    RESUME = "go on from its newest whole checkpoint"
    FRESH = "discard it"


def train(
    config: TrainConfig,
    out: Path,
    cache: Path,
    start: Start = Start.NEW,
    data: Prepared | None = None,
    *,
    sharding: Sharding | None = None,
) -> AdapterManifest:
    """Trains the recipe and returns the manifest of `out/adapter`; its checkpoints go once the adapter is whole.

    `data` spares reading the rows again where they are prepared already, as the recipe says.

    Raises ModelError, DataError, CheckpointError or BusyError before any step, DiskError where a write is refused, and
    TrainingStopped after a signal.
    """
    with disk_failures(out), run_lock(out) if this_process().is_main_process else nullcontext():
        return _train(config, out, cache, start, data, sharding)


def _train(
    config: TrainConfig, out: Path, cache: Path, start: Start, data: Prepared | None, sharding: Sharding | None
) -> AdapterManifest:
    directory = out / "checkpoints"
    if start is Start.NEW and not checkpoint.is_empty(directory):
        raise CheckpointError(f"{directory} is of an unfinished run: go on with --resume, or discard it with --fresh")
    unreported = start is not Start.RESUME or not (out / MARKDOWN_NAME).is_file()
    run = assemble(config, out, cache, data, report=unreported, sharding=sharding)
    done = resume(run) if start is Start.RESUME else 0
    log = _open(run, done)
    with stop_requests() as stop, tracking(run.accelerator, config):
        _steps(run, log, done, stop)
    run = unsharded(run)
    if run.accelerator.is_main_process:
        if config.run.early_stopping_patience:
            _take_best(run, log)
        # Not before: an interrupted retraining must leave the old adapter its own held-out rows.
        held_out = out / "held_out.jsonl.tmp"
        write_held_out(held_out, run.data.held_out)
        sync(held_out)  # the checkpoints, which could write it again, go soon
        held_out.replace(out / "held_out.jsonl")
        save_adapter(out / "adapter", run, log)
        checkpoint.discard(out / "checkpoints")
    run.accelerator.wait_for_everyone()
    return read_manifest(out / "adapter")


def _open(run: Run, done: int) -> TrainLog:
    if not run.accelerator.is_main_process:
        return TrainLog(None)
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / BAD_BATCH).unlink(missing_ok=True)
    if done == 0:
        checkpoint.discard(run.out / "checkpoints")
    checkpoint.discard_unfinished(run.out / "checkpoints")
    for name in _UNFINISHED:
        (run.out / name).unlink(missing_ok=True)
    (run.out / "recipe.toml").write_text(resolved_toml(run.config), encoding="utf-8")
    if run.data.report is not None:
        path = write_report(run.out, run.data.report)
        print(f"{summary(run.data.report)}\nwhole data report: {path}", file=sys.stderr, flush=True)
    return TrainLog(run.out / "train_log.jsonl", done)


def _steps(run: Run, log: TrainLog, done: int, stop: Sequence[int]) -> None:
    progress = Progress(run.total, done)
    every = run.config.run
    samples = open_samples(run, done)
    if done == 0:
        _validate(run, log, 0)
        take_samples(run, samples, 0)
    elif _is_stale(run, log):
        return
    for step in range(done + 1, run.total + 1):
        record = optimizer_step(run, step - 1)
        _record(run, log, record)
        last = step == run.total
        if run.accelerator.is_main_process:
            progress.step(record, show=last or step % every.log_every == 0)
        if last or step % every.eval_every == 0:
            _validate(run, log, step)
            last = last or _is_stale(run, log)
        if last or step % (every.sample_every or every.eval_every) == 0:
            take_samples(run, samples, step)
        stopping = _anywhere(run, bool(stop))
        if last or stopping or step % every.save_every == 0 or _is_best(log, step):
            _save(run, log, step)
        if stopping and not last:
            raise TrainingStopped(f"stopped by a signal after step {step} of {run.total}; go on with --resume")
        if last:
            break


def _validate(run: Run, log: TrainLog, step: int) -> None:
    nll_nats = validation_nll(run)
    if nll_nats is None:
        return
    if not math.isfinite(nll_nats):
        raise NonFiniteError(f"the held-out NLL is {nll_nats} after step {step}; the checkpoints before it stay")
    _record(run, log, ValidationRecord(step, nll_nats))
    if run.accelerator.is_main_process:
        print(f"held-out NLL {nll_nats:.3f} nats a token after step {step}", file=sys.stderr, flush=True)


def _record(run: Run, log: TrainLog, record: StepRecord | ValidationRecord) -> None:
    log.add(record)
    track(run.accelerator, record)


def _is_best(log: TrainLog, step: int) -> bool:
    best = log.best()
    return best is not None and best[0] == step


def _is_stale(run: Run, log: TrainLog) -> bool:
    """Whether early stopping ends the run; the first process, which alone has the whole log, tells the others."""
    patience = run.config.run.early_stopping_patience
    if patience is None:
        return False
    stale = run.accelerator.is_main_process and log.stale() >= patience
    return _anywhere(run, stale)


def _anywhere(run: Run, here: bool) -> bool:
    """Whether it is so in any process: all must end at the same step, or the others wait for one that left."""
    return bool(run.accelerator.reduce(torch.tensor(int(here), device=run.accelerator.device), "sum") > 0)


def _take_best(run: Run, log: TrainLog) -> None:
    best = log.best()
    assert best is not None  # early stopping is refused without validation rows
    path = checkpoint.of_step(run.out / "checkpoints", best[0])
    set_trained_weights(run.peft_model, checkpoint.load(path, run.inputs).weights)
    print(f"the adapter is that of step {best[0]}, the best by held-out NLL: {best[1]:.3f} nats", file=sys.stderr)


def _save(run: Run, log: TrainLog, step: int) -> None:
    state = capture(run, step)
    if run.accelerator.is_main_process:
        best, keep = log.best(), run.config.run.keep_checkpoints
        log.sync()  # the best of a resumed run is read from the log: it must not be older than the checkpoint
        checkpoint.save(run.out / "checkpoints", state, keep, best[0] if best else None)
        plot_loss(log, run.out / "loss.png", f"{run.config.run.name}: training loss")
