"""The verdict: one sentence on whether an arm is better than the base, and what it rests on."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from evalharness.comparison import Comparison, MetricRow
from evalharness.metrics.measure import Better
from evalharness.report.numbers import interval_text, signed

PRIMARY = ("perplexity", "rouge_l")  # decided beforehand: with many metrics one would differ by chance


class Outcome(enum.Enum):
    BETTER = "better"
    WORSE = "worse"
    MIXED = "mixed"
    UNDECIDED = "undecided"
    UNMEASURED = "unmeasured"


WORDS = {
    Outcome.BETTER: "{arm} is better than {base}",
    Outcome.WORSE: "{arm} is worse than {base}",
    Outcome.MIXED: "{arm} is better than {base} in one measure and worse in the other",
    Outcome.UNDECIDED: "No difference between {arm} and {base} is shown",
    Outcome.UNMEASURED: "{arm} could not be compared with {base}",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    arm: str
    outcome: Outcome
    headline: str
    evidence: tuple[str, ...]


def verdicts(comparison: Comparison) -> list[Verdict]:
    return [_verdict(comparison, arm) for arm in comparison.others]


def direction(row: MetricRow, arm: str) -> int:
    """Returns 1 where the arm is better beyond its interval, -1 where worse, 0 where neither is shown."""
    found = row.differences[arm]
    if found.interval is None or not found.interval.excludes_zero or row.better is Better.NEITHER:
        return 0
    return 1 if (found.interval.low > 0) == (row.better is Better.HIGHER) else -1


def _verdict(comparison: Comparison, arm: str) -> Verdict:
    rows = [row for row in comparison.metrics if row.name in PRIMARY and row.differences[arm].interval is not None]
    outcome = _outcome([direction(row, arm) for row in rows])
    headline = WORDS[outcome].format(arm=comparison.name(arm), base=comparison.name(comparison.base))
    return Verdict(arm, outcome, headline, tuple(_evidence(row, arm) for row in rows))


def _outcome(directions: list[int]) -> Outcome:
    if not directions:
        return Outcome.UNMEASURED
    if 1 in directions and -1 in directions:
        return Outcome.MIXED
    if 1 in directions:
        return Outcome.BETTER
    return Outcome.WORSE if -1 in directions else Outcome.UNDECIDED


def _evidence(row: MetricRow, arm: str) -> str:
    found = row.differences[arm]
    percent = f" ({signed(found.change_percent, 1)} %)" if found.change_percent is not None else ""
    return f"{row.label} {signed(found.value)}{percent}, 95 % CI {interval_text(found.interval)}, {found.pairs} pairs"
