from __future__ import annotations

from evalharness.comparison import compare
from evalharness.report.forest import CENTRE, PLOT_LEFT, PLOT_WIDTH, forest


def test_better_is_to_the_right_whichever_way_a_metric_runs(finished_run):
    plot = forest(compare(finished_run, 200), "starter")
    assert {row.label for row in plot.rows} >= {"Perplexity", "ROUGE-L"}
    assert "Reply length (words)" not in {row.label for row in plot.rows}
    for row in plot.rows:
        assert row.tone == "better"
        assert CENTRE < row.x_low <= row.x <= row.x_high <= PLOT_LEFT + PLOT_WIDTH
        assert row.y < plot.height
