"""Properties of the plot: a line for each rate, a panel for each target set, a gap where a run failed."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from training.sweep.grid import Axis
from training.sweep.outcome import Outcome, Status
from training.sweep.plot import plot_sweep

TARGETS = Axis("lora.target_modules", ("all-linear", '["q_proj","v_proj"]'))
RATES, RANKS = Axis("optim.learning_rate", ("5e-5", "2e-4")), Axis("lora.rank", ("4", "8", "16"))


def outcomes(*axes: Axis) -> list[Outcome]:
    found = []
    for number, values in enumerate(product(*(axis.values for axis in axes))):
        named = {axis.field: value for axis, value in zip(axes, values, strict=True)}
        failed = number == 1
        status = Status.FAILED if failed else Status.DONE
        found.append(Outcome(named, f"run-{number}", status, nll_nats=None if failed else 2.0 + number / 100))
    return found


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    real = Figure.savefig

    def keep(figure: Figure, *arguments, **options):
        saved.append(figure)
        return real(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def test_rank_is_along_rates_are_lines_and_targets_are_panels(tmp_path: Path, figures: list[Figure]):
    axes = [TARGETS, RATES, RANKS]
    plot_sweep(tmp_path / "sweep.png", "Sweep", axes, outcomes(*axes))
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == [f"lora.target_modules = {value}" for value in TARGETS.values]
    assert [[line.get_label() for line in panel.lines] for panel in panels] == [list(RATES.values)] * 2
    assert [tick.get_text() for tick in panels[0].get_xticklabels()] == list(RANKS.values)
    assert panels[1].lines[1].get_ydata().tolist() == pytest.approx([2.09, 2.10, 2.11])
    first = panels[0].lines[0].get_ydata().tolist()
    assert first == pytest.approx([2.0, float("nan"), 2.02], nan_ok=True)


def test_one_field_alone_is_one_line(tmp_path: Path, figures: list[Figure]):
    plot_sweep(tmp_path / "sweep.png", "Sweep", [RATES], outcomes(RATES))
    (panel,) = figures[0].axes
    assert len(panel.lines) == 1
    assert panel.get_xlabel() == "optim.learning_rate"
