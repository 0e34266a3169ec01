"""What the page shows of single samples: each arm's reply, its scores and its failure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from evalharness.comparison import MISSING, Comparison
from evalharness.records import RecordKey, RecordKind, SampleStatus
from evalharness.samples import Sample


@dataclass(frozen=True, slots=True)
class Cell:
    arm: str
    status: str
    completion: str | None
    finish_reason: str | None
    error: str | None
    rouge_l: float | None
    perplexity: float | None
    latency_s: float | None

    @property
    def answered(self) -> bool:
        return self.status == SampleStatus.OK.value


@dataclass(frozen=True, slots=True)
class SampleView:
    """`change` is the first adapter's ROUGE-L minus the base's, where both were scored."""

    id: str
    prompt: str
    reference: str | None
    cells: tuple[Cell, ...]
    change: float | None

    @property
    def state(self) -> str:
        """One word that the page's filter uses."""
        if not all(cell.answered or cell.status == MISSING for cell in self.cells):
            return "failed"
        if self.change is None:
            return "unscored"
        if self.change == 0:
            return "equal"
        return "better" if self.change > 0 else "worse"


@dataclass(frozen=True, slots=True)
class Failure:
    kind: str
    sample_id: str
    arm: str
    status: str
    error: str


def sample_views(comparison: Comparison, kind: RecordKind) -> list[SampleView]:
    samples = comparison.data.prompts if kind is RecordKind.FIXED else comparison.data.held_out
    return [_view(comparison, kind, sample) for sample in samples]


def failures(comparison: Comparison) -> list[Failure]:
    """Returns every request that was made and gave nothing to score."""
    return [
        Failure(record.kind.value, record.sample_id, record.arm, record.status.value, record.error or "")
        for record in comparison.data.records.values()
        if record.status is not SampleStatus.OK
    ]


def _view(comparison: Comparison, kind: RecordKind, sample: Sample) -> SampleView:
    cells = tuple(_cell(comparison, kind, sample.id, arm) for arm in comparison.header.arms)
    prompt = "\n\n".join(f"[{message.role}] {message.content}" for message in sample.messages)
    text = sample.prompt_text() if len(sample.messages) == 1 else prompt
    return SampleView(sample.id, text, sample.reference, cells, _change(cell.rouge_l for cell in cells[:2]))


def _cell(comparison: Comparison, kind: RecordKind, sample_id: str, arm: str) -> Cell:
    record = comparison.data.records.get(RecordKey(kind, sample_id, arm))
    if record is None:
        return Cell(arm, MISSING, None, None, "not asked yet", None, None, None)
    held_out = kind is RecordKind.HELD_OUT
    scores = comparison.scores.get(arm, {}).get(sample_id, {}) if held_out else {}
    return Cell(
        arm=arm,
        status=record.status.value,
        completion=record.completion,
        finish_reason=record.finish_reason,
        error=record.error,
        rouge_l=scores.get("rouge_l"),
        perplexity=scores.get("perplexity"),
        latency_s=record.latency_s,
    )


def _change(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return found[1] - found[0] if len(found) == 2 else None
