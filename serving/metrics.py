"""The metrics: one Prometheus registry for each app, with bounded label sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.engine.completion import Piece
from serving.engine.engine import EngineStats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SECONDS_A_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """`model` labels are names from the catalog, or "" where a request named none of them."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self.requests = Counter(
            "graft_requests", "Answered requests", ["route", "model", "status"], registry=self._registry
        )
        self.stream_errors = Counter(
            "graft_stream_errors", "Streams that ended in an error event", ["code"], registry=self._registry
        )
        self.prompt_tokens = Counter("graft_prompt_tokens", "Prompt tokens read", ["model"], registry=self._registry)
        self.completion_tokens = Counter(
            "graft_completion_tokens", "Completion tokens generated", ["model"], registry=self._registry
        )
        self.ttft_s = self._seconds("graft_ttft_seconds", "From a request's arrival to its first token", SECONDS)
        self.tpot_s = self._seconds("graft_tpot_seconds", "Time per output token after the first", SECONDS_A_TOKEN)
        self.e2e_s = self._seconds("graft_e2e_seconds", "From a request's arrival to its last token", SECONDS)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model"], buckets=buckets, registry=self._registry)


class Stopwatch:
    """Times the pieces of one HTTP request and hands the numbers to `metrics`."""

    def __init__(self, metrics: Metrics, model: str, arrived_s: float) -> None:
        self._metrics = metrics
        self._model = model
        self._arrived_s = arrived_s
        self._first: dict[int, _Mark] = {}  # by choice
        self._last: dict[int, _Mark] = {}
        self.ttft_s: float | None = None

    def see(self, piece: Piece) -> None:
        mark = _Mark(time.perf_counter(), piece.generated)
        new = piece.generated - (self._last[piece.index].generated if piece.index in self._last else 0)
        self._metrics.completion_tokens.labels(self._model).inc(new)
        if new:  # a stop token comes with no new one, and is not timed
            self._first.setdefault(piece.index, mark)
            self._last[piece.index] = mark
            if self.ttft_s is None:
                self.ttft_s = mark.at_s - self._arrived_s
                self._metrics.ttft_s.labels(self._model).observe(self.ttft_s)
        if piece.finish_reason is not None and piece.index in self._last:
            self._observe_tpot(self._first[piece.index], self._last[piece.index])

    def end(self) -> float:
        """Returns the whole time in seconds."""
        total_s = time.perf_counter() - self._arrived_s
        self._metrics.e2e_s.labels(self._model).observe(total_s)
        return total_s

    def _observe_tpot(self, first: _Mark, last: _Mark) -> None:
        tokens = last.generated - first.generated  # more than one token may have come with the first
        if tokens:
            self._metrics.tpot_s.labels(self._model).observe((last.at_s - first.at_s) / tokens)


@dataclass(frozen=True, slots=True)
class _Mark:
    """How many tokens a choice had at a time."""

    at_s: float
    generated: int


class _EngineCollector(Collector):
    """Asks the engine when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("graft_engine_ready", "1 once requests can run", value=float(stats is not None))
        if stats is not None:
            yield GaugeMetricFamily("graft_engine_running", "Sequences in the batch", value=stats.running)
            yield GaugeMetricFamily("graft_engine_waiting", "Sequences waiting for a row", value=stats.waiting)
            yield CounterMetricFamily("graft_engine_steps", "Forward passes", value=stats.steps)
