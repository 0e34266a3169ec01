from __future__ import annotations

import io
import math

import pytest

from evalharness.comparison import Comparison, compare
from evalharness.records import RECORDS_NAME, Record, RecordKind, SampleStatus, open_run, record_writer
from evalharness.samples import load_fixed_prompts
from tests.evalharness.endpoint import better_adapter, header, run_once, samples, serve


def row(comparison: Comparison, name: str):
    return next(row for row in comparison.metrics if row.name == name)


@pytest.fixture(scope="module")
def comparison(finished_run) -> Comparison:
    return compare(finished_run, 500)


def test_a_planted_lift_is_found_in_every_quality_metric(comparison):
    for name in ("rouge_1", "rouge_l", "bleu", "chrf"):
        assert row(comparison, name).differences["starter"].interval.low > 0
    assert row(comparison, "rouge_l").estimates["starter"].value == pytest.approx(100)


def test_perplexity_is_the_exponential_of_the_mean_nll(comparison):
    found = row(comparison, "perplexity")
    assert found.estimates["base"].value == pytest.approx(math.exp(2.0))
    assert found.differences["starter"].change_percent == pytest.approx(100 * (math.exp(-0.5) - 1))
    assert found.differences["starter"].pairs == 12


def test_a_failed_reply_is_counted_neither_scored_zero_nor_lost(comparison):
    found = row(comparison, "rouge_l")
    assert (found.estimates["base"].count, found.failed["base"]) == (11, 1)
    assert (found.estimates["starter"].count, found.failed["starter"]) == (12, 0)
    assert found.differences["starter"].pairs == 11
    assert any("1 http_error" in warning for warning in comparison.warnings)
    assert any("ROUGE-L (11)" in warning for warning in comparison.warnings)


def test_what_answered_is_kept_by_arm(comparison):
    assert comparison.arms[1].answered_by == ("starter (no fingerprint)", "starter@1 (fp-starter)")
    assert not any("several revisions" in warning for warning in comparison.warnings)


def test_the_order_of_records_does_not_matter(finished_run, comparison, tmp_path):
    for path in finished_run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (finished_run / RECORDS_NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / RECORDS_NAME).write_bytes(b"".join(reversed(lines)))
    again = compare(tmp_path, 500)
    assert [(m.estimates, m.differences) for m in again.metrics] == [
        (m.estimates, m.differences) for m in comparison.metrics
    ]


def test_scoring_shows_how_far_it_is(finished_run):
    out = io.StringIO()
    compare(finished_run, 100, out)
    shown = [line.split("  ") for line in out.getvalue().splitlines()]
    for label, total in (("metrics", 3 * (11 + 12)), ("intervals", 7)):
        lines = [line[1:] for line in shown if line[0] == label]
        assert (lines[0], lines[-1][0]) == ([f"0/{total}"], f"{total}/{total}")
        assert all("/s" in line[1] and "ETA" in line[2] for line in lines[1:])


def test_an_empty_run_has_no_numbers_only_reasons(tmp_path):
    open_run(tmp_path, header("http://h", samples(2)), load_fixed_prompts().samples, samples(2))
    found = compare(tmp_path, 100)
    assert all(estimate.value is None for m in found.metrics for estimate in m.estimates.values())
    assert {m.unavailable for m in found.metrics} == {"no request of this kind was made yet"}
    assert found.arms[0].statuses["held_out"] == {"missing": 2}


def test_perplexity_that_a_server_cannot_give_is_unavailable_with_its_reason(tmp_path):
    server = better_adapter()
    server.chat_only = True
    with serve(server) as url:
        run_once(tmp_path, url, samples(2))
    found = row(compare(tmp_path, 100), "perplexity")
    assert found.estimates["base"].value is None
    assert "/tokenize: HTTP 404" in found.unavailable


def nll(arm: str, sample_id: str, scored: str) -> Record:
    return Record(
        kind=RecordKind.NLL,
        sample_id=sample_id,
        arm=arm,
        status=SampleStatus.OK,
        nll_nats=4.0,
        nll_tokens=2,
        scored_sha256=scored,
        model=f"{arm}-{sample_id}",
    )


def test_perplexities_over_other_tokens_are_not_compared(tmp_path):
    open_run(tmp_path, header("http://h", samples(2)), (), samples(2))
    with record_writer(tmp_path) as writer:
        for record in (nll(arm, f"s{n}", f"{arm if n else 'same'}") for arm in ("base", "starter") for n in range(2)):
            writer.append(record)
    found = compare(tmp_path, 100)
    assert row(found, "perplexity").estimates["starter"].value == pytest.approx(math.exp(2))
    assert row(found, "perplexity").differences["starter"].value is None
    assert any("other tokens" in warning for warning in found.warnings)


def test_an_arm_answered_by_two_revisions_is_a_warning(tmp_path):
    open_run(tmp_path, header("http://h", samples(2)), (), samples(2))
    with record_writer(tmp_path) as writer:
        writer.append(nll("base", "s0", "x"))
        writer.append(nll("base", "s1", "x"))
    assert any("several revisions" in warning and "base-s0" in warning for warning in compare(tmp_path, 100).warnings)
