"""The runs of a sweep, one after the other: finished ones are skipped, and one that fails does not end the rest."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState

from training.artifact import AdapterManifest, ArtifactError, fingerprint_base, verify_adapter
from training.base import resolve_base
from training.config import DataConfig, ModelConfig, TrainConfig, resolved_toml
from training.errors import TrainingError
from training.log import clock
from training.model import load_tokenizer
from training.prepare import Prepared, prepare
from training.stop import TrainingStopped
from training.sweep.grid import Axis, Point
from training.sweep.outcome import Outcome, Status, read_outcome
from training.sweep.plot import plot_sweep
from training.sweep.table import PLOT_NAME, write_table
from training.train import Start, train


class SweepError(TrainingError):
    """A sweep that cannot be made here."""


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What runs of the same data and base share: read, rendered and hashed once."""

    model: ModelConfig
    data: DataConfig
    eval_rows: int
    prepared: Prepared
    fingerprint: str

    def serve(self, config: TrainConfig) -> bool:
        return (self.model, self.data, self.eval_rows) == (config.model, config.data, config.run.eval_rows)


def run_sweep(recipe: str, axes: Sequence[Axis], points: Sequence[Point], out: Path, cache: Path) -> list[Outcome]:
    """Trains each point in a folder of `out` named by its values, and keeps the table and the plot up to date.

    A run that is cut off is resumed by the next sweep, and a failed one tried again. Raises SweepError for several
    processes, and TrainingStopped after a signal.
    """
    if PartialState().num_processes > 1:
        raise SweepError("a sweep runs in one process; start it without accelerate launch")
    out.mkdir(parents=True, exist_ok=True)
    outcomes = [Outcome(point.values, point.config.run.name, Status.WAITING) for point in points]
    inputs: _Inputs | None = None
    begun, tried = time.monotonic(), 0
    for at, point in enumerate(points):
        left = f", about {clock((time.monotonic() - begun) / tried * (len(points) - at))} left" if tried else ""
        print(f"sweep: run {at + 1} of {len(points)}{left}: {point.label}", file=sys.stderr, flush=True)
        try:
            inputs = inputs if inputs and inputs.serve(point.config) else _read(point.config, cache)
            manifest = _finished(point.config, out / point.config.run.name, inputs)
            tried += manifest is None
            manifest = manifest or _train(point.config, out / point.config.run.name, cache, inputs)
            outcomes[at] = read_outcome(point.values, out / point.config.run.name, manifest)
        except TrainingStopped:
            raise
        except Exception as error:  # whatever ends one run must not end the others: it is told, and in the table
            message = f"{type(error).__name__}: {error}"
            outcomes[at] = replace(outcomes[at], status=Status.FAILED, error=message)
            print(f"sweep: run {at + 1} failed, the next one follows: {message}", file=sys.stderr, flush=True)
        write_table(out, recipe, outcomes)
        plot_sweep(out / PLOT_NAME, f"Sweep of {recipe}", axes, outcomes)
    return outcomes


def _read(config: TrainConfig, cache: Path) -> _Inputs:
    base = resolve_base(config.model, cache)
    prepared = prepare(load_tokenizer(base.directory), config.data, config.run.eval_rows)
    return _Inputs(config.model, config.data, config.run.eval_rows, prepared, fingerprint_base(base.directory))


def _finished(config: TrainConfig, folder: Path, inputs: _Inputs) -> AdapterManifest | None:
    """Returns the manifest of a whole run that was made from this recipe, data and base."""
    try:
        manifest = verify_adapter(folder / "adapter")
    except ArtifactError:
        return None
    same = manifest.recipe == config.model_dump(mode="json") and manifest.base.fingerprint == inputs.fingerprint
    if not same or manifest.data.sha256 != inputs.prepared.facts.sha256:
        return None
    print(f"sweep: {folder.name} is up to date", file=sys.stderr, flush=True)
    return manifest


def _train(config: TrainConfig, folder: Path, cache: Path, inputs: _Inputs) -> AdapterManifest:
    """The weights are loaded anew for each run: an adapter's layers are built into them."""
    _forget_peak()
    recipe = folder / "recipe.toml"
    unchanged = recipe.is_file() and recipe.read_text(encoding="utf-8") == resolved_toml(config)
    return train(config, folder, cache, Start.RESUME if unchanged else Start.FRESH, inputs.prepared)


def _forget_peak() -> None:
    """Lets the next run's peak memory be its own, not that of a larger run before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # not Linux, or not allowed: then its peak is at least the process's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
