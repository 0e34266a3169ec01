from __future__ import annotations

import pytest

from evalharness.comparison import compare
from evalharness.records import open_run
from evalharness.report.verdict import Outcome, verdicts
from tests.evalharness.endpoint import ChatServer, header, reference_of, run_once, samples, serve


def good(prompt: str) -> str:
    return reference_of(prompt)


def bad(prompt: str) -> str:
    return "No idea at all."


@pytest.mark.parametrize(
    ("base", "adapter", "outcome"),
    [
        ((bad, -2.0), (good, -1.0), Outcome.BETTER),
        ((good, -1.0), (bad, -2.0), Outcome.WORSE),
        ((bad, -1.0), (good, -2.0), Outcome.MIXED),
        ((bad, -1.0), (bad, -1.0), Outcome.UNDECIDED),
    ],
)
def test_the_outcome_follows_both_primary_measures(tmp_path, base, adapter, outcome):
    replies, logprobs = zip(base, adapter, strict=True)
    arms = ("base", "starter")
    server = ChatServer(dict(zip(arms, replies, strict=True)), dict(zip(arms, logprobs, strict=True)))
    with serve(server) as url:
        run_once(tmp_path, url, samples(6))
    (verdict,) = verdicts(compare(tmp_path, 200))
    assert verdict.outcome is outcome
    assert len(verdict.evidence) == 2
    assert "6 pairs" in verdict.evidence[0]


def test_nothing_measured_is_said(tmp_path):
    open_run(tmp_path, header("http://h", samples(2)), (), samples(2))
    (verdict,) = verdicts(compare(tmp_path, 100))
    assert (verdict.outcome, verdict.evidence) == (Outcome.UNMEASURED, ())
