"""The training run, top to bottom: read, render, pack, step, save."""

from __future__ import annotations

import enum
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from training import checkpoint
from training.adapter import save_adapter
from training.artifact import AdapterManifest, read_manifest
from training.checkpoint import CheckpointError
from training.config import TrainConfig, resolved_toml
from training.log import Progress, TrainLog, ValidationRecord, plot_loss
from training.run import Run, assemble, capture, resume
from training.split import write_held_out
from training.step import optimizer_step, validation_nll
from training.stop import TrainingStopped, stop_requests


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
    with stop_requests() as stop:
        _steps(run, log, done, stop)
    if run.accelerator.is_main_process:
        save_adapter(out / "adapter", run.peft_model, run.tokenizer, config, run.base, run.data, log)
        shutil.rmtree(out / "checkpoints")
    run.accelerator.wait_for_everyone()
    return read_manifest(out / "adapter")


def _open(run: Run, done: int) -> TrainLog:
    if not run.accelerator.is_main_process:
        return TrainLog(None)
    run.out.mkdir(parents=True, exist_ok=True)
    if done == 0:
        shutil.rmtree(run.out / "checkpoints", ignore_errors=True)
    (run.out / "recipe.toml").write_text(resolved_toml(run.config), encoding="utf-8")
    write_held_out(run.out / "held_out.jsonl", run.data.held_out)
    return TrainLog(run.out / "train_log.jsonl", done)


def _steps(run: Run, log: TrainLog, done: int, stop: Sequence[int]) -> None:
    progress = Progress(run.total, done)
    every = run.config.run
    if done == 0:
        _validate(run, log, 0)
    for step in range(done + 1, run.total + 1):
        record = optimizer_step(run, step - 1)
        log.add(record)
        last = step == run.total
        if run.accelerator.is_main_process:
            progress.step(record, show=last or step % every.log_every == 0)
        if last or step % every.eval_every == 0:
            _validate(run, log, step)
        if last or stop or step % every.save_every == 0:
            _save(run, log, step)
        if stop and not last:
            raise TrainingStopped(f"stopped by signal {stop[0]} after step {step} of {run.total}; go on with --resume")


def _validate(run: Run, log: TrainLog, step: int) -> None:
    nll_nats = validation_nll(run)
    if nll_nats is None:
        return
    log.add(ValidationRecord(step, nll_nats))
    if run.accelerator.is_main_process:
        print(f"held-out NLL {nll_nats:.3f} nats a token after step {step}", file=sys.stderr, flush=True)


def _save(run: Run, log: TrainLog, step: int) -> None:
    if run.accelerator.is_main_process:
        checkpoint.save(run.out / "checkpoints", capture(run, step), run.config.run.keep_checkpoints)
        plot_loss(log, run.out / "loss.png", f"{run.config.run.name}: training loss")
