"""The training log: one JSON line a step, a progress line, and the loss plot drawn from them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from training.disk import sync

_SMOOTHING = 0.8  # weight of the past in the plotted running mean


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, over all devices; `nll_nats` is a labelled token's."""

    step: int  # 1-based
    epoch: float
    nll_nats: float
    learning_rate: float
    grad_norm: float | None  # None where fp16's scaler overflowed
    tokens: int
    labelled_tokens: int
    tokens_per_s: float
    peak_gib: float
    overflows: int = 0  # 1: fp16's scaler overflowed, and the update was skipped


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """The NLL of held-out rows after `step` optimizer steps."""

    step: int
    validation_nll_nats: float


class TrainLog:
    """Owns `train_log.jsonl` of one run; a resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path | None, resume_step: int = 0) -> None:
        self.path = path  # None: kept in memory alone, as all but the first of several processes do
        self.lines: list[dict[str, Any]] = []
        if path is not None:
            self.lines = [line for line in read_log(path) if resume_step and line["step"] <= resume_step]
            kept = path.with_suffix(".tmp")
            kept.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
            kept.replace(path)

    def add(self, record: StepRecord | ValidationRecord) -> None:
        line = asdict(record)
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Has the disk hold what was logged so far."""
        if self.path is not None:
            sync(self.path)

    def losses(self) -> list[tuple[int, float]]:
        return [(line["step"], line["nll_nats"]) for line in self.lines if "nll_nats" in line]

    def validation(self) -> list[tuple[int, float]]:
        return [(line["step"], line["validation_nll_nats"]) for line in self.lines if "validation_nll_nats" in line]

    def best(self) -> tuple[int, float] | None:
        """Returns (step, NLL) of the lowest validation NLL, the earliest of equals; None before the first step's."""
        return min((pair for pair in self.validation() if pair[0]), key=lambda pair: pair[1], default=None)

    def stale(self) -> int:
        """Returns how many validations in a row stand at the end without a new lowest NLL."""
        best = self.best()
        return sum(step > best[0] for step, _ in self.validation()) if best else 0


class Progress:
    """Prints where a run stands, a line a step: step, loss, tokens/s, ETA."""

    def __init__(self, total: int, done: int = 0, out: TextIO | None = None) -> None:
        self.total, self.first, self.out = total, done, out or sys.stderr
        self.begun = time.monotonic()
        self.tokens = 0

    def step(self, record: StepRecord, *, show: bool) -> None:
        self.tokens += record.tokens
        elapsed_s = time.monotonic() - self.begun
        done = record.step - self.first
        eta_s = elapsed_s / done * (self.total - record.step)
        if show:
            self._print(
                f"step {record.step}/{self.total}  loss {record.nll_nats:.3f}  lr {record.learning_rate:.1e}  "
                f"{self.tokens / elapsed_s:,.0f} tok/s  peak {record.peak_gib:.2f} GiB  ETA {clock(eta_s)}"
            )

    def _print(self, line: str) -> None:
        print(line, file=self.out, flush=True)


def clock(seconds: float) -> str:
    """Returns h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a log; a line torn by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def plot_loss(log: TrainLog, path: Path, title: str) -> None:
    """Draws loss over steps: every step, the running mean, and the validation points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = _columns(log.losses())
    axes.plot(steps, losses, color="#9bb8d9", linewidth=1, label="step")
    axes.plot(steps, _running_mean(losses), color="#1f5fa8", linewidth=2, label="running mean")
    if log.validation():
        axes.plot(*_columns(log.validation()), "o-", color="#d9822b", linewidth=1.5, markersize=5, label="held out")
    axes.set(xlabel="optimizer step", ylabel="NLL (nats a labelled token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _running_mean(values: Sequence[float]) -> list[float]:
    means: list[float] = []
    for value in values:
        means.append(value if not means else _SMOOTHING * means[-1] + (1 - _SMOOTHING) * value)
    return means
