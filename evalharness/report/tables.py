"""Tables in the shape Metric | Base | Adapter | Change, for the console and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evalharness.comparison import Comparison, MetricRow
from evalharness.report.numbers import difference_text, estimate_text

Table = list[tuple[str, ...]]
LF_TITLE = "As LLaMA-Factory computes it; not comparable with the rest"


def metric_tables(comparison: Comparison) -> list[Table]:
    """Returns a table for each adapter, so that none is wider than a screen; one where the base stands alone."""
    return [_metric_table(comparison, arm, comparison.own_metrics) for arm in comparison.others or (None,)]


def lf_tables(comparison: Comparison) -> list[Table]:
    """Returns the same for LLaMA-Factory's metrics; none where they were not asked for."""
    rows = comparison.lf_metrics
    return [_metric_table(comparison, arm, rows) for arm in comparison.others or (None,)] if rows else []


def _metric_table(comparison: Comparison, other: str | None, rows: Iterable[MetricRow]) -> Table:
    arms = [comparison.base] if other is None else [comparison.base, other]
    names = (comparison.name(arm) for arm in arms)
    table: Table = [("Metric", *names, *(["Change (95 % CI)"] if other else []))]
    for row in rows:
        if row.unavailable is not None:
            table.append((row.label, "unavailable", *[""] * (len(table[0]) - 2)))
            continue
        change = [difference_text(row.differences[other])] if other else []
        table.append((row.label, *(estimate_text(row.estimates[arm]) for arm in arms), *change))
    return table


def count_table(comparison: Comparison) -> Table:
    kinds = tuple(comparison.arms[0].statuses)
    table: Table = [("Arm", *kinds, "cut at max_tokens", "answered by")]
    for arm in comparison.arms:
        counts = (_counts(arm.statuses[kind].items()) for kind in kinds)
        table.append((arm.arm, *counts, str(arm.truncated), "; ".join(arm.answered_by) or "nothing"))
    return table


def console(table: Table) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = [_pad(row, widths) for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def _pad(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(escaped.split())


def _counts(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(counts)) or "none"
