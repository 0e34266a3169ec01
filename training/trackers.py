"""The trackers of a run: TensorBoard and whatever else accelerate can log to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from training.config import TrainConfig
from training.errors import TrainingError
from training.fields import suggest
from training.log import StepRecord, ValidationRecord


class TrackerError(TrainingError):
    """A tracker that accelerate does not know, or whose package is not installed."""


def require_trackers(names: Sequence[str]) -> None:
    """Raises TrackerError: accelerate itself would leave a missing tracker out without a word."""
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise TrackerError(f"run.trackers names {name!r}" + suggest(name, sorted(LOGGER_TYPE_TO_CLASS)))
        if name in LoggerType and name not in installed:
            raise TrackerError(f"run.trackers names {name!r}, which is not installed: pip install {name}, or remove it")


@contextmanager
def tracking(accelerator: Any, config: TrainConfig) -> Iterator[None]:
    """Opens the recipe's trackers with the recipe as their configuration, and closes them in any case."""
    try:
        if config.run.trackers:
            accelerator.init_trackers(config.run.name, _flat(config))
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def track(accelerator: Any, record: StepRecord | ValidationRecord) -> None:
    values = asdict(record)
    step = values.pop("step")
    accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)


def _flat(config: TrainConfig) -> dict[str, str | float]:
    """Trackers take scalars alone."""
    sections = config.model_dump(mode="json", exclude_none=True)
    return {
        f"{section}.{key}": json.dumps(value) if isinstance(value, list) else value
        for section, fields in sections.items()
        for key, value in fields.items()
    }
