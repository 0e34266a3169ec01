"""Tables in the shape Metric | Base | Adapter | Change, for the console and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evalharness.comparison import Comparison
from evalharness.report.numbers import difference_text, estimate_text

Table = list[tuple[str, ...]]


def metric_table(comparison: Comparison) -> Table:
    """Returns the header row and one row a metric; with several adapters each has its own Change column."""
    changes = ["Change (95 % CI)"] if len(comparison.others) == 1 else [f"Change, {arm}" for arm in comparison.others]
    table: Table = [("Metric", *comparison.header.arms, *changes[: len(comparison.others)])]
    for row in comparison.metrics:
        if row.unavailable is not None:
            table.append((row.label, "unavailable", *[""] * (len(table[0]) - 2)))
            continue
        values = (estimate_text(row.estimates[arm]) for arm in comparison.header.arms)
        table.append((row.label, *values, *(difference_text(row.differences[arm]) for arm in comparison.others)))
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
