from __future__ import annotations

from evalharness.comparison import compare
from evalharness.records import open_run
from evalharness.report.tables import console, count_table, markdown, metric_tables
from tests.evalharness.endpoint import better_adapter, header, run_once, samples, serve


def test_the_table_is_metric_base_adapter_change(finished_run):
    (table,) = metric_tables(compare(finished_run, 200))
    assert table[0] == ("Metric", "base", "starter", "Change (95 % CI)")
    assert [row[0] for row in table[1:6]] == ["Perplexity", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU"]
    assert len({len(row) for row in table}) == 1
    assert "7.39" in table[1][1]


def test_several_adapters_have_a_table_each_beside_the_base(finished_run, tmp_path):
    server, arms = better_adapter(), ("base", "starter@0123456789ab", "other")
    server.replies["other"], server.logprobs["other"] = server.replies["base"], -1.9
    with serve(server) as url:
        server.models = {arm: {} for arm in arms}
        run_once(tmp_path, url, samples(3), arms)
    first, second = metric_tables(compare(tmp_path, 100))
    assert first[0] == ("Metric", "base", "starter", "Change (95 % CI)")
    assert second[0] == ("Metric", "base", "other", "Change (95 % CI)")
    assert first[1][1] == second[1][1]
    (alone,) = metric_tables(compare(finished_run, 100))
    widest = max(len(line) for line in console(alone).splitlines())
    assert max(len(line) for table in (first, second) for line in console(table).splitlines()) <= widest + 10


def test_a_base_alone_has_no_change_column(tmp_path):
    open_run(tmp_path, header("http://h", samples(2), ("base",)), (), samples(2))
    (table,) = metric_tables(compare(tmp_path, 100))
    assert table[0] == ("Metric", "base")
    assert table[1] == ("Perplexity", "unavailable")


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
