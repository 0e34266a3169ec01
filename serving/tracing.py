"""The traces: a span a request with its phases, sent to an OpenTelemetry collector where one is configured.

Spans are made of what is known at a request's end, so a request waits for nothing; a thread of OpenTelemetry's sends
them in batches and drops what it cannot hold. Nothing is imported without a collector.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.config import ConfigError
from serving.middleware import RequestFacts
from serving.version import graft_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

CLOSE_S = 5.0  # what a stop waits at most for the last spans to be sent
_TRACES_PATH = "/v1/traces"


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a request, in seconds after its arrival; `first_token_s` is an event in it."""

    name: str
    start_s: float
    end_s: float
    first_token_s: float | None = None


class Tracing:
    """Turns requests into spans until it is closed."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("graft")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, scope: Scope, arrived_ns: int) -> None:
        """Takes a request that has ended. It continues the caller's trace; one that is not sampled is left out."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        facts: RequestFacts = scope["state"]["facts"]
        ended_ns = time.time_ns()
        span = self._tracer.start_span(
            f"{scope['method']} {_route(scope)}",
            self._propagator.extract(dict(Headers(scope=scope))),
            kind=SpanKind.SERVER,
            attributes=_attributes(scope, facts),
            start_time=arrived_ns,
        )
        inside = set_span_in_context(span)
        for phase in phases(facts, (ended_ns - arrived_ns) / 1e9):
            child = self._tracer.start_span(phase.name, inside, start_time=arrived_ns + int(phase.start_s * 1e9))
            if phase.first_token_s is not None:
                child.add_event("first_token", timestamp=arrived_ns + int(phase.first_token_s * 1e9))
            child.end(arrived_ns + int(phase.end_s * 1e9))
        if facts.stream_error is not None or (facts.status or 0) >= 500:
            span.set_status(StatusCode.ERROR, facts.stream_error)
        span.end(ended_ns)

    def close(self) -> None:
        """Sends what is left; gives up after CLOSE_S, so that a dead collector does not hold a stop."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


class TraceRequests:
    """The middleware, the outermost: what it does comes after the answer."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_ns = time.time_ns()
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                self._tracing.record(scope, arrived_ns)


@contextmanager
def traced(app: Starlette, endpoint: str | None) -> Iterator[None]:
    """Traces what `app` answers, and sends the last spans at the end; without an endpoint it does nothing.

    The app must not have answered before. Raises ConfigError as `open_tracing` does.
    """
    if endpoint is None:
        yield
        return
    tracing = open_tracing(endpoint)
    app.add_middleware(TraceRequests, tracing=tracing)
    try:
        yield
    finally:
        tracing.close()


def open_tracing(endpoint: str) -> Tracing:
    """`endpoint` is a collector's base URL for OTLP over HTTP, such as http://localhost:4318.

    OpenTelemetry's own OTEL_* variables set the rest. Raises ConfigError where its packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"--otlp-endpoint {endpoint}: OpenTelemetry is not installed ({error}); install the extra `trace`, or "
            "leave the endpoint out"
        ) from error
    own = Resource({"service.name": "graft", "service.version": graft_version()})
    provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint.rstrip("/") + _TRACES_PATH)))
    return Tracing(provider)


def phases(facts: RequestFacts, ended_s: float) -> Iterator[Phase]:
    """Yields the phases that a request came to; the last ends with it."""
    if facts.planned_s is None:  # it was no completion, or was refused while it was planned
        return
    yield Phase("plan", 0.0, facts.planned_s)
    yield Phase("queue", facts.planned_s, ended_s if facts.queue_s is None else facts.queue_s)
    if facts.queue_s is not None:
        yield Phase("generate", facts.queue_s, ended_s if facts.total_s is None else facts.total_s, facts.ttft_s)


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "unmatched"))


def _attributes(scope: Scope, facts: RequestFacts) -> Mapping[str, AttributeValue]:
    known: dict[str, AttributeValue | None] = {
        "http.request.method": scope["method"],
        "http.route": _route(scope),
        "http.response.status_code": facts.status,
        "graft.request_id": facts.request_id,
        "graft.model": facts.model or None,
        "graft.arm": facts.arm or None,
        "graft.stream_error": facts.stream_error,
        "graft.client_left": facts.client_left or None,
        "gen_ai.response.model": facts.revision or None,
        "gen_ai.usage.input_tokens": facts.prompt_tokens,
        "gen_ai.usage.output_tokens": facts.completion_tokens,
    }
    return {name: value for name, value in known.items() if value is not None}
