"""The outcome of one run of a sweep: its held-out NLL and what it cost, read from the run's own folder."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from training.artifact import ADAPTER_WEIGHTS, AdapterManifest
from training.log import read_log


class Status(enum.Enum):
    DONE = "done"
    FAILED = "failed"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`nll_nats`: a labelled token's in the held-out rows, by the weights that were kept; None unless done."""

    values: dict[str, str]
    folder: str
    status: Status
    error: str | None = None
    nll_nats_before: float | None = None
    nll_nats: float | None = None
    steps: int | None = None
    trainable_parameters: int | None = None
    tokens_per_s: float | None = None  # of training steps
    peak_gib: float | None = None
    stepping_s: float | None = None


def read_outcome(values: dict[str, str], folder: Path, manifest: AdapterManifest) -> Outcome:
    """Returns what a finished run's manifest, weights and log tell."""
    loss = manifest.loss
    steps = [line for line in read_log(folder / "train_log.jsonl") if "nll_nats" in line]
    seconds = sum(line["tokens"] / line["tokens_per_s"] for line in steps)
    kept_last = loss.weights_step in (None, loss.steps)
    return Outcome(
        values=values,
        folder=folder.name,
        status=Status.DONE,
        nll_nats_before=loss.validation_first_nll_nats,
        nll_nats=loss.validation_last_nll_nats if kept_last else loss.validation_best_nll_nats,
        steps=loss.steps,
        trainable_parameters=_parameters(folder / "adapter" / ADAPTER_WEIGHTS),
        tokens_per_s=sum(line["tokens"] for line in steps) / seconds,
        peak_gib=max(line["peak_gib"] for line in steps),
        stepping_s=seconds,
    )


def _parameters(weights: Path) -> int:
    with safe_open(weights, "pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # no mapping
