"""The training run, top to bottom: read, render, pack, step, save."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from training import checkpoint
from training.adapter import save_adapter
from training.artifact import AdapterManifest, read_manifest
from training.config import TrainConfig, resolved_toml
from training.log import Progress, TrainLog, ValidationRecord, plot_loss
from training.run import Run, assemble, capture, resume
from training.split import write_held_out
from training.step import optimizer_step, validation_nll
from training.stop import TrainingStopped, stop_requests


def train(config: TrainConfig, out: Path, cache: Path, *, go_on: bool = False) -> AdapterManifest:
    """Trains the recipe and returns the manifest of `out/adapter`; `go_on` resumes the newest whole checkpoint.

    Raises ModelError, DataError or CheckpointError before any step, and TrainingStopped after a signal.
    """
    run = assemble(config, out, cache)
    done = resume(run) if go_on else 0
    log = _open(run, done)
    with stop_requests() as stop:
        _steps(run, log, done, stop)
    if run.accelerator.is_main_process:
        save_adapter(out / "adapter", run.peft_model, run.tokenizer, config, run.base, run.data, log)
    run.accelerator.wait_for_everyone()
    return read_manifest(out / "adapter")


def _open(run: Run, done: int) -> TrainLog:
    if not run.accelerator.is_main_process:
        return TrainLog(None)
    run.out.mkdir(parents=True, exist_ok=True)
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
