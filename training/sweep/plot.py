"""The plot of a sweep: held-out NLL against one field, a line for each value of a second, a panel for the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.sweep.grid import Axis
from training.sweep.outcome import Outcome

_ALONG, _LINES = "lora.rank", "optim.learning_rate"  # where they are swept; else the first fields given
_PANELS_A_ROW = 3
_LINE_COLOURS = ("#1f5fa8", "#d9822b", "#3a8f5c", "#a03a6b", "#6b5fb5", "#7a6a4f", "#2f8f9d", "#8a8a8a")


def plot_sweep(path: Path, title: str, axes: Sequence[Axis], outcomes: Sequence[Outcome]) -> None:
    """Draws what is done so far; a run that failed leaves a gap in its line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    along, lines, rest = _roles(axes)
    panels = dict.fromkeys(_panel(outcome, rest) for outcome in outcomes)
    columns = min(len(panels), _PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 4.2 * columns, 0.9 + 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for place, panel in zip(grid, panels, strict=False):
        _draw(place, along, lines, [outcome for outcome in outcomes if _panel(outcome, rest) == panel])
        place.set_title(panel, fontsize=10)
    for place in grid[len(panels) :]:
        place.set_visible(False)
    for place in grid[::columns]:
        place.set_ylabel("held-out NLL (nats a token)")
    if lines is not None:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, title=lines.field, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(title)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _roles(axes: Sequence[Axis]) -> tuple[Axis, Axis | None, list[Axis]]:
    left = list(axes)
    along = next((axis for axis in left if axis.field == _ALONG), None) or left[0]
    left.remove(along)
    lines = next((axis for axis in left if axis.field == _LINES), None) or (left[0] if left else None)
    return along, lines, [axis for axis in left if axis is not lines]


def _panel(outcome: Outcome, rest: Sequence[Axis]) -> str:
    return "\n".join(f"{axis.field} = {outcome.values[axis.field]}" for axis in rest)


def _draw(place: Any, along: Axis, lines: Axis | None, outcomes: Sequence[Outcome]) -> None:
    places = range(len(along.values))  # values may be words, and ranks double from one to the next: even steps
    for number, value in enumerate(lines.values if lines else (None,)):
        found = {o.values[along.field]: o.nll_nats for o in outcomes if lines is None or o.values[lines.field] == value}
        heights = [found.get(name) for name in along.values]
        colour = _LINE_COLOURS[number % len(_LINE_COLOURS)]
        with_gaps = [float("nan") if height is None else height for height in heights]
        place.plot(places, with_gaps, "o-", color=colour, linewidth=1.8, markersize=5, label=value)
    if all(outcome.nll_nats is None for outcome in outcomes):
        place.text(0.5, 0.5, "no run done", ha="center", color="#8a8a8a", transform=place.transAxes)
    place.set_xticks(list(places), along.values, fontsize=9)
    place.set_xlim(-0.3, len(along.values) - 0.7)
    place.set_xlabel(along.field)
    place.grid(alpha=0.25)
