"""Times and counts are those of the pieces."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from serving.engine.completion import Piece
from serving.engine.engine import EngineStats, FinishReason
from serving.metrics import Metrics, Stopwatch


def value(metrics: Metrics, name: str) -> float:
    lines = metrics.exposition().decode().splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that the stopwatch reads; a test writes them."""
    now = [0.0]
    monkeypatch.setattr("serving.metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def see_all(watch: Stopwatch, clock: list[float], pieces: Iterable[tuple[float, int, int, FinishReason | None]]):
    for clock[0], index, generated, reason in pieces:
        watch.see(Piece(index, "x", (), generated, None, reason))


def test_a_stopwatch_counts_tokens_and_times_them(clock):
    metrics = Metrics(lambda: None)
    watch = Stopwatch(metrics, "base", 1.0)
    pieces = [(2.0, 0, 0, None), (3.0, 0, 1, None), (4.0, 0, 3, None), (9.0, 0, 3, FinishReason.STOP)]
    see_all(watch, clock, [*pieces, (9.0, 1, 1, FinishReason.LENGTH)])
    assert (watch.ttft_s, watch.end()) == (2.0, 8.0)
    assert value(metrics, 'graft_completion_tokens_total{arm="",model="base"}') == 4
    assert value(metrics, 'graft_ttft_seconds_count{arm="",model="base"}') == 1
    assert value(metrics, 'graft_ttft_seconds_sum{arm="",model="base"}') == 2.0
    assert value(metrics, 'graft_tpot_seconds_count{arm="",model="base"}') == 1, "one token has no time after the first"
    assert value(metrics, 'graft_tpot_seconds_sum{arm="",model="base"}') == 0.5, (
        "the stop token's step is no token's time"
    )
    assert value(metrics, 'graft_e2e_seconds_sum{arm="",model="base"}') == 8.0


def test_tokens_that_come_with_the_first_have_no_time(clock):
    metrics = Metrics(lambda: None)
    watch = Stopwatch(metrics, "base", 0.0)
    see_all(watch, clock, [(1.0, 0, 4, FinishReason.LENGTH), (1.0, 1, 2, None), (2.0, 1, 4, FinishReason.LENGTH)])
    assert value(metrics, 'graft_tpot_seconds_count{arm="",model="base"}') == 1
    assert value(metrics, 'graft_tpot_seconds_sum{arm="",model="base"}') == 0.5


def test_a_reply_without_a_token_has_no_first(clock):
    metrics = Metrics(lambda: None)
    watch = Stopwatch(metrics, "base", 0.0)
    see_all(watch, clock, [(1.0, 0, 0, FinishReason.STOP)])
    assert watch.ttft_s is None
    assert "graft_ttft_seconds_count{" not in metrics.exposition().decode()


def test_the_engine_is_asked_when_prometheus_asks():
    stats = [None, EngineStats(running=2, waiting=3, steps=7)]
    metrics = Metrics(lambda: stats[-1])
    assert value(metrics, "graft_engine_ready") == 1
    assert value(metrics, "graft_engine_running") == 2
    assert value(metrics, "graft_engine_waiting") == 3
    assert value(metrics, "graft_engine_steps_total") == 7
    stats.append(None)
    assert value(metrics, "graft_engine_ready") == 0


def test_the_series_of_names_that_are_served_no_more_are_dropped():
    served = ["base", "starter"]
    metrics = Metrics(lambda: None, lambda: served)
    for name in ("base", "starter", ""):
        metrics.requests.labels("/v1/completions", name, "", "200").inc()
        metrics.ttft_s.labels(name, "").observe(1.0)
    assert 'model="starter"' in metrics.exposition().decode()
    served.remove("starter")
    metrics.requests.labels("/v1/completions", "starter", "", "200").inc()  # one that was still running
    text = metrics.exposition().decode()
    assert 'model="starter"' not in text
    assert value(metrics, 'graft_requests_total{arm="",model="base"') == 1
    assert value(metrics, 'graft_requests_total{arm="",model=""') == 1


def test_two_apps_have_two_registries():
    first, second = Metrics(lambda: None), Metrics(lambda: None)
    first.prompt_tokens.labels("base", "").inc(5)
    assert "graft_prompt_tokens_total{" not in second.exposition().decode()
