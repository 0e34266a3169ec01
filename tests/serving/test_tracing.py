"""A request is one span with its phases, continues its caller's trace, and waits for no collector."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving.config import ConfigError
from serving.middleware import RequestFacts
from serving.tracing import open_tracing, phases, traced
from tests.tiny import make_fake_app, running_server, wait_until

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a word that no span carries: heliotrope"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list = []
        self.resources: list = []
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.paths.add(self.path)
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resources.append(values_of(resource.resource))
                    collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def named(self, name: str) -> list:
        return [span for span in self.spans if span.name == name]


def values_of(span) -> dict:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@contextmanager
def traced_server(endpoint: str, base: Path, adapters: dict[str, Path], **options) -> Iterator[str]:
    """Sends what is left of the spans at its end."""
    app, _ = make_fake_app(base, adapters, **options)
    with traced(app, endpoint), running_server(app) as url:
        yield url


def chat(url: str, headers: dict[str, str] | None = None, **fields) -> httpx.Response:
    body = {"model": "base", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 6, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def test_a_completion_is_a_span_with_its_phases_and_no_text(collector, tiny_base, tiny_adapters):
    with traced_server(collector.url, tiny_base, tiny_adapters, token_delay_s=0.002) as url:
        replies = [chat(url, {"x-request-id": "mine"}, model="starter", stream=stream) for stream in (False, True)]
        assert [reply.status_code for reply in replies] == [200, 200]
    assert collector.paths == {"/v1/traces"}
    assert collector.resources[0]["service.name"] == "graft"
    roots = collector.named("POST /v1/chat/completions")
    assert len(roots) == 2
    for root in roots:
        values = values_of(root)
        assert values["http.response.status_code"] == 200
        assert values["http.route"] == "/v1/chat/completions"
        assert values["graft.request_id"] == "mine"
        assert values["graft.model"] == "starter"
        assert values["gen_ai.response.model"] == replies[0].json()["model"]
        assert values["gen_ai.usage.input_tokens"] == replies[0].json()["usage"]["prompt_tokens"]
        assert 0 < values["gen_ai.usage.output_tokens"] <= 6
        children = [span for span in collector.spans if span.parent_span_id == root.span_id]
        assert [child.name for child in children] == ["plan", "queue", "generate"]
        edges = [root.start_time_unix_nano, *(child.end_time_unix_nano for child in children)]
        assert edges == sorted(edges)
        assert edges[-1] <= root.end_time_unix_nano
        for child, start in zip(children, edges, strict=False):
            assert child.start_time_unix_nano == start
            assert child.trace_id == root.trace_id
        (event,) = children[2].events
        assert event.name == "first_token"
        assert children[2].start_time_unix_nano <= event.time_unix_nano <= children[2].end_time_unix_nano
    assert "heliotrope" not in str(collector.spans)


def test_the_callers_trace_is_continued_and_what_it_does_not_sample_is_left_out(collector, tiny_base):
    with traced_server(collector.url, tiny_base, {}) as url:
        chat(url, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
        chat(url, {"traceparent": f"00-{TRACE}-{PARENT}-00"})
        chat(url, {"traceparent": "nonsense"})
    sampled, own = collector.named("POST /v1/chat/completions")
    assert (sampled.trace_id.hex(), sampled.parent_span_id.hex()) == (TRACE, PARENT)
    assert own.trace_id.hex() != TRACE
    assert not own.parent_span_id


def test_refusals_and_failures_are_spans_too(collector, tiny_base):
    app, engine = make_fake_app(tiny_base, {}, token_delay_s=0.01)
    with traced(app, collector.url), running_server(app) as url:
        assert chat(url, model="nope").status_code == 404
        assert httpx.get(f"{url}/nowhere").status_code == 404
        with httpx.stream(
            "POST",
            f"{url}/v1/chat/completions",
            json={"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 400},
            timeout=30,
        ) as response:
            lines = response.iter_lines()
            next(lines)
            engine.die()
            assert any("engine_dead" in line for line in lines)
    refused, failed = collector.named("POST /v1/chat/completions")
    assert values_of(refused)["http.response.status_code"] == 404
    assert not [span for span in collector.spans if span.parent_span_id == refused.span_id]
    assert collector.named("GET unmatched")
    assert values_of(failed)["graft.stream_error"] == "engine_dead"
    assert failed.status.code == failed.status.STATUS_CODE_ERROR


def test_a_dead_collector_fails_no_request_and_holds_no_stop(tiny_base, monkeypatch, caplog):
    monkeypatch.setattr("serving.tracing.CLOSE_S", 0.2)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    caplog.set_level("CRITICAL", logger="opentelemetry")
    with traced_server("http://127.0.0.1:9", tiny_base, {}) as url:
        assert [chat(url).status_code for _ in range(20)] == [200] * 20
    wait_until(lambda: not any(thread.name == "tracing-close" for thread in threading.enumerate()))


def test_a_missing_package_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"--otlp-endpoint http://here:4318: .* install the extra `trace`"):
        open_tracing("http://here:4318")


def test_nothing_is_imported_and_nothing_added_without_an_endpoint():
    code = (
        "import sys, serving.tracing as t\n"
        "with t.traced(None, None): pass\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, []),
        ({"planned_s": 1.0}, [("plan", 0, 1), ("queue", 1, 9)]),
        ({"planned_s": 1.0, "queue_s": 2.0}, [("plan", 0, 1), ("queue", 1, 2), ("generate", 2, 9)]),
        ({"planned_s": 1.0, "queue_s": 2.0, "total_s": 8.0}, [("plan", 0, 1), ("queue", 1, 2), ("generate", 2, 8)]),
    ],
)
def test_a_request_that_ends_early_has_the_phases_that_it_came_to(facts, expected):
    found = list(phases(RequestFacts("id", **facts), ended_s=9.0))
    assert [(phase.name, phase.start_s, phase.end_s) for phase in found] == expected
