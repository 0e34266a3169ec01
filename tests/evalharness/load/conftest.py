"""A small real server that streams slowly and writes down when it sent what."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

FIRST_TOKEN_S = 0.1
NEXT_TOKEN_S = 0.1
TOKENS = 10
MODELS = ("base", "starter")  # each is served under name@digest too, which is not listed


@dataclass
class SlowServer:
    """`ttft_s` holds what the server itself measured, request by request."""

    url: str = ""
    mode: str = "ok"
    busy_after: int | None = None  # requests answered before it turns everyone away
    ttft_s: list[float] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    connections: set = field(default_factory=set)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: SlowServer

    def log_message(self, *args: object) -> None:
        """Keeps the test's output clean."""

    def do_GET(self):
        self.state.authorizations.append(self.headers.get("Authorization"))
        name = unquote(self.path.removeprefix("/v1/models")).removeprefix("/")
        if name and name.partition("@")[0] not in MODELS:
            self._plain(404, {"error": {"message": f"model {name!r} does not exist"}})
            return
        self._plain(200, {"id": name} if name else {"object": "list", "data": [{"id": model} for model in MODELS]})

    def do_POST(self):
        begun = time.perf_counter()
        self.state.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.state.authorizations.append(self.headers.get("Authorization"))
        self.state.connections.add(self.client_address)
        full = self.state.busy_after is not None and len(self.state.bodies) > self.state.busy_after
        if full or self.state.mode == "busy":
            self._plain(429, {"error": {"message": "too many requests"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if self.state.mode != "empty":
            self._tokens(begun)
        self._end()

    def _tokens(self, begun):
        time.sleep(FIRST_TOKEN_S)
        self.state.ttft_s.append(time.perf_counter() - begun)
        for number in range(TOKENS):
            self._event({"choices": [{"delta": {"content": f"word{number} "}}], "usage": None})
            if self.state.mode in {"error", "broken"} and number == 2:
                return
            time.sleep(NEXT_TOKEN_S if number < TOKENS - 1 else 0)

    def _end(self):
        if self.state.mode == "error":
            self._event({"error": {"message": "the engine died"}})
        elif self.state.mode != "broken":
            self._event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": TOKENS}})
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, event):
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data):
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _plain(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def slow_server() -> Iterator[SlowServer]:
    state = SlowServer()
    handler = type("BoundHandler", (Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
