from __future__ import annotations

from evalharness.comparison import compare
from evalharness.records import RecordKind, open_run
from evalharness.report.view import failures, sample_views
from tests.evalharness.endpoint import better_adapter, header, run_once, samples, serve


def test_every_sample_is_shown_with_its_scores_or_its_failure(finished_run):
    comparison = compare(finished_run, 200)
    views = sample_views(comparison, RecordKind.HELD_OUT)
    assert [view.id for view in views] == [sample.id for sample in samples()]
    assert {view.state for view in views} == {"better", "failed"}
    failed = views[3]
    assert (failed.state, failed.change, failed.cells[0].rouge_l) == ("failed", None, None)
    assert failed.cells[1].completion == failed.reference
    assert [(f.sample_id, f.arm, f.status) for f in failures(comparison)] == [("s3", "base", "http_error")]


def test_fixed_prompts_are_shown_without_scores(finished_run):
    views = sample_views(compare(finished_run, 200), RecordKind.FIXED)
    assert len(views) == 5
    assert all(cell.rouge_l is None and cell.completion for view in views for cell in view.cells)


def test_what_was_not_asked_yet_is_missing_not_failed_silently(tmp_path):
    open_run(tmp_path, header("http://h", samples(1)), (), samples(1))
    (view,) = sample_views(compare(tmp_path, 100), RecordKind.HELD_OUT)
    assert [cell.status for cell in view.cells] == ["missing", "missing"]
    assert view.state == "unscored"


def test_what_has_no_pair_is_unscored_and_only_a_change_of_zero_is_equal(tmp_path):
    states = {}
    for arms in (("base",), ("base", "same")):
        server = better_adapter()
        server.replies["same"], server.logprobs["same"] = server.replies["base"], -2.0
        with serve(server) as url:
            run_once(tmp_path / str(len(arms)), url, samples(2), arms)
        comparison = compare(tmp_path / str(len(arms)), 100)
        states[arms] = {view.state for view in sample_views(comparison, RecordKind.HELD_OUT)}
    assert states == {("base",): {"unscored"}, ("base", "same"): {"equal"}}
