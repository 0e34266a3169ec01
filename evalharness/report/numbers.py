"""Numbers as text: a true minus sign, two decimals, and a dash for what is not there."""

from __future__ import annotations

from evalharness.statistics import Difference, Estimate, Interval

NOTHING = "–"
MINUS = "\u2212"


def plain(value: float | None, decimals: int = 2) -> str:
    return NOTHING if value is None else f"{value:.{decimals}f}".replace("-", MINUS)


def signed(value: float | None, decimals: int = 2) -> str:
    return NOTHING if value is None else f"{value:+.{decimals}f}".replace("-", MINUS)


def interval_text(interval: Interval | None) -> str:
    return NOTHING if interval is None else f"[{plain(interval.low)}, {plain(interval.high)}]"


def estimate_text(found: Estimate) -> str:
    if found.value is None:
        return NOTHING
    return plain(found.value) if found.interval is None else f"{plain(found.value)} {interval_text(found.interval)}"


def difference_text(found: Difference) -> str:
    if found.value is None:
        return NOTHING
    percent = "" if found.change_percent is None else f" ({signed(found.change_percent, 1)} %)"
    return f"{signed(found.value)} {interval_text(found.interval)}{percent}"
