"""The metrics: one Prometheus registry for each app, with bounded label sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.engine.completion import Piece
from serving.engine.engine import EngineStats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ARM = ("model", "arm")
SECONDS_A_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """`model` labels are names of served models, or "" where a request named none of them.

    `arm` is the label that routed to a revision, or "". `names` tells which names are served now; the series of any
    other are dropped, so that retired ones do not gather.
    """

    def __init__(
        self, stats: Callable[[], EngineStats | None], names: Callable[[], Iterable[str]] | None = None
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self._names = names
        self._of_models: list[Counter | Histogram] = []
        self.requests = self._counter("graft_requests", "Answered requests", "route", *ARM, "status")
        self.stream_errors = self._counter("graft_stream_errors", "Streams that ended in an error event", *ARM, "code")
        self.prompt_tokens = self._counter("graft_prompt_tokens", "Prompt tokens read", *ARM)
        self.completion_tokens = self._counter("graft_completion_tokens", "Completion tokens generated", *ARM)
        self.shadows = self._counter("graft_shadows", "Requests for a shadow, by what became of it", "model", "outcome")
        self.queue_s = self._seconds("graft_queue_seconds", "From a request's arrival to a row in the batch", SECONDS)
        self.load_s = Histogram(
            "graft_load_seconds", "Time to load a revision into the engine", buckets=SECONDS, registry=self._registry
        )
        self.ttft_s = self._seconds("graft_ttft_seconds", "From a request's arrival to its first token", SECONDS)
        self.tpot_s = self._seconds("graft_tpot_seconds", "Time per output token after the first", SECONDS_A_TOKEN)
        self.e2e_s = self._seconds("graft_e2e_seconds", "From a request's arrival to its last token", SECONDS)
        self.engine_stalled = Gauge(
            "graft_engine_stalled", "1 while the engine has work and makes no step", registry=self._registry
        )
        self.rate_limited = Counter(
            "graft_rate_limited", "Requests over a limit of their key", ["key", "limit"], registry=self._registry
        )

    def gauge_by_model(self, name: str, text: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Adds a gauge that is read when Prometheus asks, by model or revision; a model's revisions are summed."""
        self._registry.register(_ModelGauge(name, text, read))

    def exposition(self) -> bytes:
        if self._names is not None:
            self._forget_all_but({"", *self._names()})
        return generate_latest(self._registry)

    def _forget_all_but(self, names: Set[str]) -> None:
        for metric in self._of_models:
            known = {sample.labels["model"] for family in metric.collect() for sample in family.samples}
            for name in known - names:
                metric.remove_by_labels({"model": name})

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(name, text, labels, registry=self._registry)
        self._of_models.append(counter)
        return counter

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, ARM, buckets=buckets, registry=self._registry)
        self._of_models.append(histogram)
        return histogram


class Stopwatch:
    """Times the pieces of one HTTP request and hands the numbers to `metrics`."""

    def __init__(self, metrics: Metrics, model: str, arrived_s: float, arm: str = "") -> None:
        self._metrics = metrics
        self._labels = (model, arm)
        self._completion_tokens = metrics.completion_tokens.labels(model, arm)  # found once: every piece counts
        self._arrived_s = arrived_s
        self._first: dict[int, _Mark] = {}  # by choice
        self._last: dict[int, _Mark] = {}
        self.ttft_s: float | None = None

    def see(self, piece: Piece) -> None:
        mark = _Mark(time.perf_counter(), piece.generated)
        new = piece.generated - (self._last[piece.index].generated if piece.index in self._last else 0)
        self._completion_tokens.inc(new)
        if new:  # a stop token comes with no new one, and is not timed
            self._first.setdefault(piece.index, mark)
            self._last[piece.index] = mark
            if self.ttft_s is None:
                self.ttft_s = mark.at_s - self._arrived_s
                self._metrics.ttft_s.labels(*self._labels).observe(self.ttft_s)
        if piece.finish_reason is not None and piece.index in self._last:
            self._observe_tpot(self._first[piece.index], self._last[piece.index])

    def queued(self, queue_s: float) -> None:
        self._metrics.queue_s.labels(*self._labels).observe(queue_s)

    def end(self) -> float:
        """Returns the whole time in seconds."""
        total_s = time.perf_counter() - self._arrived_s
        self._metrics.e2e_s.labels(*self._labels).observe(total_s)
        return total_s

    def _observe_tpot(self, first: _Mark, last: _Mark) -> None:
        tokens = last.generated - first.generated  # more than one token may have come with the first
        if tokens:
            self._metrics.tpot_s.labels(*self._labels).observe((last.at_s - first.at_s) / tokens)


@dataclass(frozen=True, slots=True)
class _Mark:
    """How many tokens a choice had at a time."""

    at_s: float
    generated: int


class _ModelGauge(Collector):
    """Asks its source when Prometheus asks."""

    def __init__(self, name: str, text: str, read: Callable[[], Mapping[str, float]]) -> None:
        self._name, self._text, self._read = name, text, read

    def collect(self) -> Iterator[Metric]:
        sums: dict[str, float] = {}
        for revision, value in self._read().items():
            name = revision.partition("@")[0]
            sums[name] = sums.get(name, 0.0) + value
        gauge = GaugeMetricFamily(self._name, self._text, labels=["model"])
        for model, value in sums.items():
            gauge.add_metric([model], value)
        yield gauge


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
