"""Times and counts are those of the pieces."""

from __future__ import annotations

import time

from serving.engine.completion import Piece
from serving.engine.engine import EngineStats, FinishReason
from serving.metrics import Metrics, Stopwatch


def value(metrics: Metrics, name: str) -> float:
    lines = metrics.exposition().decode().splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_stopwatch_counts_tokens_and_times_them():
    metrics = Metrics(lambda: None)
    watch = Stopwatch(metrics, "base", time.perf_counter() - 1.0)
    for generated, reason in ((0, None), (1, None), (3, None), (3, FinishReason.STOP)):
        watch.see(Piece(0, "x", (), generated, None, reason))
        time.sleep(0.02)
    watch.see(Piece(1, "x", (), 1, None, FinishReason.LENGTH))
    watch.end()
    assert value(metrics, 'graft_completion_tokens_total{model="base"}') == 4
    assert value(metrics, 'graft_ttft_seconds_count{model="base"}') == 1
    assert 1.0 < value(metrics, 'graft_ttft_seconds_sum{model="base"}') < 3
    assert value(metrics, 'graft_tpot_seconds_count{model="base"}') == 1, "one token has no time after the first"
    assert 0.015 < value(metrics, 'graft_tpot_seconds_sum{model="base"}') < 1
    assert value(metrics, 'graft_e2e_seconds_count{model="base"}') == 1


def test_the_engine_is_asked_when_prometheus_asks():
    stats = [None, EngineStats(running=2, waiting=3, steps=7)]
    metrics = Metrics(lambda: stats[-1])
    assert value(metrics, "graft_engine_ready") == 1
    assert value(metrics, "graft_engine_running") == 2
    assert value(metrics, "graft_engine_waiting") == 3
    assert value(metrics, "graft_engine_steps_total") == 7
    stats.append(None)
    assert value(metrics, "graft_engine_ready") == 0


def test_two_apps_have_two_registries():
    first, second = Metrics(lambda: None), Metrics(lambda: None)
    first.prompt_tokens.labels("base").inc(5)
    assert "graft_prompt_tokens_total{" not in second.exposition().decode()
