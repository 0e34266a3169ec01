"""A small OpenAI-compatible server that a test scripts, and runs made against it."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from evalharness.client import Client
from evalharness.records import RunHeader, SamplingSettings
from evalharness.runner import run
from evalharness.samples import Message, Sample, data_sha256, load_fixed_prompts

IM_START, IM_END, NEWLINE = 1, 2, 10
ARMS = ("base", "starter")


@dataclass(frozen=True)
class Answer:
    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Handler(Protocol):
    def __call__(self, path: str, body: dict[str, Any]) -> Answer: ...


@contextmanager
def serve(handle: Handler) -> Iterator[str]:
    """Serves `handle(path, body)` on a free port and yields its URL."""

    class Requests(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            length = int(self.headers.get("content-length") or 0)
            answer = handle(self.path, json.loads(self.rfile.read(length) or b"{}"))
            if isinstance(handle, ChatServer):
                handle.authorizations.append(self.headers.get("authorization"))
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {"content-length": str(len(content)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, format, *values: Any):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chat_ids(messages: list[dict[str, str]], generation_prompt: bool) -> list[int]:
    """ChatML over characters: an own id a character, and a newline after each end of turn."""
    ids: list[int] = []
    for message in messages:
        text = f"{message['role']}\n{message['content']}"
        ids += [IM_START, *map(ord, text), IM_END, NEWLINE]
    return [*ids, IM_START, *map(ord, "assistant\n")] if generation_prompt else ids


@dataclass
class ChatServer:
    """Answers each arm from `replies`, and gives each of its tokens the log-probability in `logprobs`."""

    replies: dict[str, Callable[[str], str]]
    logprobs: dict[str, float]
    chat_only: bool = False
    failing: set[tuple[str, str]] = field(default_factory=set)  # (arm, prompt)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # (path, arm, prompt)
    authorizations: list[str | None] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)  # what it tells of a model asked for by name
    revision: str = "1"  # what its replies call theirs

    def __call__(self, path: str, body: dict[str, Any]) -> Answer:
        if path == "/v1/chat/completions":
            return self._chat(body)
        if path == "/v1/models":
            return Answer({"object": "list", "data": [{"id": arm} for arm in self.replies]})
        if (name := unquote(path.removeprefix("/v1/models/"))) in self.models:
            return Answer({"id": name, **self.models[name]})
        if path == "/tokenize" and not self.chat_only:
            return Answer({"tokens": chat_ids(body["messages"], body["add_generation_prompt"])})
        if path == "/v1/completions" and not self.chat_only:
            return self._score(body)
        return Answer({"error": {"message": "Not Found"}}, 404)

    def _chat(self, body: dict[str, Any]) -> Answer:
        arm, prompt = body["model"], body["messages"][-1]["content"]
        self.asked.append(("chat", arm, prompt))
        if (arm, prompt) in self.failing:
            return Answer({"error": {"message": "out of <luck>"}}, 500)
        message = {"role": "assistant", "content": self.replies[arm.partition("@")[0]](prompt)}
        reply = {"choices": [{"message": message, "finish_reason": "stop"}], "model": f"{arm}@{self.revision}"}
        return Answer({**reply, "system_fingerprint": f"fp-{arm}"}, headers={"x-request-id": f"req-{arm}"})

    def _score(self, body: dict[str, Any]) -> Answer:
        assert body["max_tokens"] == 0
        assert body["echo"]
        self.asked.append(("score", body["model"], ""))
        logprobs = [None, *[self.logprobs[body["model"].partition("@")[0]]] * (len(body["prompt"]) - 1)]
        return Answer({"choices": [{"text": "", "logprobs": {"token_logprobs": logprobs}}], "model": body["model"]})


def samples(count: int = 12) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            id=f"s{number}",
            messages=(Message(role="user", content=f"Question number {number}?"),),
            reference=f"The answer to question number {number} is short and clear, with {number} good parts.",
        )
        for number in range(count)
    )


def reference_of(prompt: str) -> str:
    """What the good arm says: each sample's reference; for other prompts, a sentence."""
    return next((s.reference or "" for s in samples(40) if s.prompt_text() == prompt), "A plain sentence.")


def header(url: str, held_out: tuple[Sample, ...], arms: tuple[str, ...] = ARMS) -> RunHeader:
    return RunHeader(
        url=url,
        arms=arms,
        sampling=SamplingSettings(),
        data_sha256=data_sha256(held_out),
        prompts_sha256=load_fixed_prompts().sha256,
        limit=None,
        held_out_samples=len(held_out),
    )


def run_once(directory: Path, url: str, held_out: tuple[Sample, ...], arms: tuple[str, ...] = ARMS) -> str:
    """Runs the evaluation in this process; returns what it showed as progress."""
    out = io.StringIO()

    async def ask_all() -> None:
        async with Client(url, timeout_s=10) as client:
            prompts = load_fixed_prompts().samples
            await run(directory, header(url, held_out, arms), prompts, held_out, client, concurrency=3, out=out)

    asyncio.run(ask_all())
    return out.getvalue()


def better_adapter() -> ChatServer:
    return ChatServer(
        replies={"base": lambda prompt: f"I do not know about that: {prompt}", "starter": reference_of},
        logprobs={"base": -2.0, "starter": -1.5},
    )
