from __future__ import annotations

from evalharness.comparison import compare
from evalharness.records import open_run
from evalharness.report.tables import console, count_table, markdown, metric_table
from tests.evalharness.endpoint import header, samples


def test_the_table_is_metric_base_adapter_change(finished_run):
    table = metric_table(compare(finished_run, 200))
    assert table[0] == ("Metric", "base", "starter", "Change (95 % CI)")
    assert [row[0] for row in table[1:6]] == ["Perplexity", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU"]
    assert len({len(row) for row in table}) == 1
    assert "7.39" in table[1][1]


def test_several_adapters_have_a_change_column_each_and_one_arm_has_none(tmp_path):
    for arms, width in ((("base", "starter", "other"), 6), (("base",), 2)):
        directory = tmp_path / str(width)
        open_run(directory, header("http://h", samples(2), arms), (), samples(2))
        table = metric_table(compare(directory, 100))
        assert {len(row) for row in table} == {width}
        assert table[1][1] == "unavailable"


def test_counts_are_told_by_status(finished_run):
    table = count_table(compare(finished_run, 200))
    held_out = table[0].index("held_out")
    assert [row[held_out] for row in table[1:]] == ["1 http_error, 11 ok", "12 ok"]


def test_the_console_table_is_aligned():
    lines = console([("a", "bb"), ("ccc", "d")]).splitlines()
    assert lines == ["a    bb", "---  --", "ccc  d"]


def test_a_markdown_cell_cannot_leave_its_cell():
    text = markdown([("a", "b"), ("x|y", "<script>\nz")])
    assert text.splitlines()[2] == "| x\\|y | &lt;script> z |"
