"""An ECDF as inline SVG: the share of requests that were at most so slow, one step line a series."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 12, 44
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito: told apart by all
DASHES = ("", "6 3", "2 3")
MAX_POINTS = 400  # a line; more would not be seen


def ecdf_svg(series: Mapping[str, Sequence[float]], label: str) -> str | None:
    """`series` maps a name to values in seconds, `label` names the x axis; None where no series has a value."""
    known = {name: sorted(values) for name, values in series.items() if values}
    if not known:
        return None
    limit = _round_up(max(values[-1] for values in known.values()))
    lines = "".join(_line(number, name, values, limit) for number, (name, values) in enumerate(known.items()))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="ECDF of {html.escape(label)}" '
        f'font-family="system-ui, sans-serif" font-size="12">{_axes(limit, label)}{lines}</svg>'
    )


def _round_up(value: float) -> float:
    """Returns the next of 1, 2 or 5 times a power of ten, so that ticks have short names."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-3)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def _x(value: float, limit: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * value / limit


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _axes(limit: float, label: str) -> str:
    parts = []
    for tick in range(6):
        x, y = _x(limit * tick / 5, limit), _y(tick / 5)
        parts.append(f'<path d="M{x:.1f} {_y(0)}V{TOP}M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{_y(0) + 16}" text-anchor="middle">{limit * tick / 5:g}</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick * 20} %</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(label)}</text>')
    return "".join(parts)


def _line(number: int, name: str, values: Sequence[float], limit: float) -> str:
    stride = max(1, len(values) // MAX_POINTS)
    kept = sorted({*range(0, len(values), stride), len(values) - 1})
    steps = "".join(f"H{_x(values[at], limit):.1f}V{_y((at + 1) / len(values)):.1f}" for at in kept)
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    style = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" fill="none"'
    y = _y(0) - 12 - 16 * number
    legend = f'<path d="M{WIDTH - 190} {y - 4}h24" {style}/><text x="{WIDTH - 160}" y="{y}">{html.escape(name)}</text>'
    return f'<path d="M{LEFT} {_y(0)}{steps}H{WIDTH - RIGHT}" {style}/>{legend}'
