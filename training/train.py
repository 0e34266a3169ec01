"""The training run, top to bottom: read, render, pack, step, save."""

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import set_peft_model_state_dict

from training import checkpoint
from training.adapter import save_adapter
from training.artifact import AdapterManifest, read_manifest
from training.bad_batch import BAD_BATCH, NonFiniteError
from training.checkpoint import CheckpointError
from training.config import TrainConfig, resolved_toml
from training.log import Progress, StepRecord, TrainLog, ValidationRecord, plot_loss
from training.run import Run, assemble, capture, resume
from training.split import write_held_out
from training.step import optimizer_step, validation_nll
from training.stop import TrainingStopped, stop_requests
from training.trackers import track, tracking


class Start(enum.Enum):
    """What to do where `out` holds an unfinished run."""

    NEW = "refuse"
    RESUME = "go on from its newest whole checkpoint"
    FRESH = "discard it"


def train(config: TrainConfig, out: Path, cache: Path, start: Start = Start.NEW) -> AdapterManifest:
    """Trains the recipe and returns the manifest of `out/adapter`; its checkpoints go once the adapter is whole.

    Raises ModelError, DataError or CheckpointError before any step, and TrainingStopped after a signal.
    """
    if start is Start.NEW and (unfinished := checkpoint.newest(out / "checkpoints")):
        raise CheckpointError(f"{unfinished} is of an unfinished run: go on with --resume, or discard it with --fresh")
    run = assemble(config, out, cache)
    done = resume(run) if start is Start.RESUME else 0
    log = _open(run, done)
    with stop_requests() as stop, tracking(run.accelerator, config):
        _steps(run, log, done, stop)
    if run.accelerator.is_main_process:
        if config.run.early_stopping_patience:
            _take_best(run, log)
        # Not before: an interrupted retraining must leave the old adapter its own held-out rows.
        write_held_out(out / "held_out.jsonl", run.data.held_out)
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
    (run.out / "recipe.toml").write_text(resolved_toml(run.config), encoding="utf-8")
    return TrainLog(run.out / "train_log.jsonl", done)


def _steps(run: Run, log: TrainLog, done: int, stop: Sequence[int]) -> None:
    progress = Progress(run.total, done)
    every = run.config.run
    if done == 0:
        _validate(run, log, 0)
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
    set_peft_model_state_dict(run.peft_model, dict(checkpoint.load(path, run.inputs).weights))
    print(f"the adapter is that of step {best[0]}, the best by held-out NLL: {best[1]:.3f} nats", file=sys.stderr)


def _save(run: Run, log: TrainLog, step: int) -> None:
    if run.accelerator.is_main_process:
        best, keep = log.best(), run.config.run.keep_checkpoints
        checkpoint.save(run.out / "checkpoints", capture(run, step), keep, best[0] if best else None)
        plot_loss(log, run.out / "loss.png", f"{run.config.run.name}: training loss")
