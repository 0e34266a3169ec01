"""Summary maths from known samples."""

from __future__ import annotations

import numpy as np
import pytest

from evalharness.load.sample import LoadSample, SampleStatus
from evalharness.load.summary import latency, percentile, summarise


def sample(arm="base", scenario="base", **fields: object) -> LoadSample:
    known = {"scheduled": None, "start": 100.0, "ttft_s": 0.1, "tpot_s": 0.01, "e2e_s": 1.0, "completion_tokens": 20}
    return LoadSample(**{"scenario": scenario, "arm": arm, "status": SampleStatus.OK, **known, **fields})


def failed(status, **fields: object) -> LoadSample:
    none = {"ttft_s": None, "tpot_s": None, "completion_tokens": None}
    return sample(status=status, **{**none, **fields})


@pytest.mark.parametrize("q", [0, 50, 90, 99, 100])
def test_percentiles_are_those_of_numpy(q):
    values = sorted(np.random.default_rng(1).lognormal(size=137))
    assert percentile(values, q) == pytest.approx(np.percentile(values, q))


def test_no_value_is_none_and_not_zero():
    assert latency([None, None]) is None
    assert summarise([]) == []
    (row,) = summarise([failed(SampleStatus.CONNECTION, e2e_s=None)])
    assert (row.ttft_s, row.output_tokens_per_s, row.requests_per_s, row.error_share) == (None, None, None, 1.0)


def test_rates_are_over_first_start_to_last_end():
    (row,) = summarise([sample(start=100.0), sample(start=103.0, e2e_s=2.0)])
    assert row.window_s == 5.0
    assert row.output_tokens_per_s == 40 / 5
    assert row.requests_per_s == 2 / 5


def test_errors_are_counted_by_kind_and_stay_out_of_latencies():
    busy = failed(SampleStatus.HTTP_ERROR, http_status=429, e2e_s=9.0)
    (row,) = summarise([sample(), busy, busy, failed(SampleStatus.TIMEOUT, e2e_s=0.5)])
    assert row.errors == {"http_429": 2, "timeout": 1}
    assert (row.requests, row.answered, row.error_share) == (4, 1, 0.75)
    assert row.e2e_s.n == 1
    assert row.e2e_s.p99 == 1.0


def test_mixed_has_a_row_for_each_arm_and_one_for_all_over_the_same_window():
    mixed = [sample("base", "mixed"), sample("starter", "mixed", start=101.0), sample("starter", "mixed", start=102.0)]
    rows = summarise([sample(), *mixed])
    assert [(row.scenario, row.arm) for row in rows] == [
        ("base", "base"),
        ("mixed", "base"),
        ("mixed", "starter"),
        ("mixed", "all"),
    ]
    assert [row.window_s for row in rows[1:]] == [3.0, 3.0, 3.0]
    assert rows[3].output_tokens_per_s == pytest.approx(rows[1].output_tokens_per_s + rows[2].output_tokens_per_s)


def test_latency_from_arrival_has_the_wait_for_a_free_user():
    (row,) = summarise([sample(scheduled=97.0)])
    assert row.ttft_from_arrival_s.p50 == pytest.approx(3.1)
    assert row.e2e_from_arrival_s.p50 == pytest.approx(4.0)
    (closed,) = summarise([sample()])
    assert closed.e2e_from_arrival_s is None


def test_unsent_arrivals_are_errors():
    (row,) = summarise([sample(scheduled=99.0), failed(SampleStatus.NOT_SENT, start=None, scheduled=99.5, e2e_s=None)])
    assert row.errors == {"not_sent": 1}


def test_empty_replies_are_counted_apart_and_leave_ttft_alone():
    (row,) = summarise([sample(), sample(ttft_s=None, tpot_s=None, completion_tokens=0)])
    assert (row.answered, row.without_content, row.ttft_s.n, row.errors) == (2, 1, 1, {})


def test_tokens_per_s_is_unavailable_where_a_reply_lacks_usage():
    (row,) = summarise([sample(), sample(completion_tokens=None, tpot_s=None)])
    assert row.without_usage == 1
    assert row.output_tokens_per_s is None
