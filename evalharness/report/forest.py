"""The forest plot's geometry: each paired difference with its interval, better to the right."""

from __future__ import annotations

from dataclasses import dataclass

from evalharness.comparison import Comparison, MetricRow
from evalharness.metrics.measure import Better
from evalharness.report.numbers import difference_text
from evalharness.report.verdict import direction
from evalharness.statistics import Interval

ROW_HEIGHT = 30
PLOT_LEFT, PLOT_WIDTH = 150, 300
CENTRE = PLOT_LEFT + PLOT_WIDTH / 2


@dataclass(frozen=True, slots=True)
class ForestRow:
    """Positions in SVG units; each row has its own scale, and all share the line of no difference."""

    label: str
    y: float
    x: float
    x_low: float
    x_high: float
    text: str
    tone: str  # better, worse or neutral


@dataclass(frozen=True, slots=True)
class Forest:
    arm: str
    rows: tuple[ForestRow, ...]

    @property
    def height(self) -> int:
        return ROW_HEIGHT * len(self.rows) + 34


def forest(comparison: Comparison, arm: str) -> Forest:
    rows: list[ForestRow] = []
    for row in comparison.own_metrics:
        found = row.differences[arm]
        if row.better is not Better.NEITHER and found.value is not None and found.interval is not None:
            rows.append(_row(row, arm, found.value, found.interval, len(rows)))
    return Forest(arm, tuple(rows))


def _row(row: MetricRow, arm: str, value: float, interval: Interval, number: int) -> ForestRow:
    sign = 1 if row.better is Better.HIGHER else -1
    reach = max(abs(interval.low), abs(interval.high), abs(value)) or 1.0
    scale = sign * PLOT_WIDTH / 2 / reach * 0.95
    low, high = sorted((CENTRE + interval.low * scale, CENTRE + interval.high * scale))
    tone = {1: "better", -1: "worse", 0: "neutral"}[direction(row, arm)]
    y = ROW_HEIGHT * (number + 0.5) + 4
    return ForestRow(row.label, y, CENTRE + value * scale, low, high, difference_text(row.differences[arm]), tone)
