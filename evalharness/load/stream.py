"""One streaming chat completion over HTTP, timed at its deltas."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from evalharness.load.sample import LoadSample, SampleStatus

PATH = "/v1/chat/completions"
CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 120.0  # between two reads
KEEPALIVE_S = 4.0  # uvicorn closes idle connections after 5: a request must not meet a closing one
MAX_ERROR_CHARS = 300

Chat = tuple[Mapping[str, str], ...]


class _Delta(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    delta: _Delta = _Delta()


class _Usage(BaseModel):
    completion_tokens: int


class _Chunk(BaseModel):
    choices: Sequence[_Choice] = ()
    usage: _Usage | None = None
    error: Any = None


@dataclass(slots=True)
class StreamWatch:
    """Times one reply with `clock`, in seconds. It can be read at any moment: until the end it says CUT_OFF."""

    clock: Callable[[], float] = time.perf_counter
    started: float = field(init=False)
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    tokens: int | None = None
    done: bool = False
    status: SampleStatus = SampleStatus.CUT_OFF
    http_status: int | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.started = self.clock()

    def read(self, line: str) -> None:
        """Takes one line of the event stream, as soon as it arrives."""
        now = self.clock()
        if not line.startswith("data:") or self.ended is not None:
            return
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self.done = True
            return
        try:
            self._take(_Chunk.model_validate_json(data), now)
        except ValidationError:
            self.fail(SampleStatus.BROKEN_STREAM, f"not a chat completion chunk: {data}")

    def _take(self, chunk: _Chunk, now: float) -> None:
        if chunk.error is not None:
            self.fail(SampleStatus.STREAM_ERROR, str(chunk.error))
            return
        if chunk.usage is not None:
            self.tokens = chunk.usage.completion_tokens
        if any(choice.delta.content for choice in chunk.choices):
            self.first = now if self.first is None else self.first
            self.last = now

    def fail(self, status: SampleStatus, error: str) -> None:
        if self.ended is None:
            self.ended, self.status, self.error = self.clock(), status, error[:MAX_ERROR_CHARS]

    def finish(self) -> None:
        """The server has closed the stream."""
        if not self.done:
            self.fail(SampleStatus.BROKEN_STREAM, "the stream ended before [DONE]")
        elif self.ended is None:
            self.ended, self.status = self.clock(), SampleStatus.OK

    def sample(self, scenario: str, arm: str, start: float, scheduled: float | None) -> LoadSample:
        """`start` and `scheduled` are Unix times: the watch itself knows durations only."""
        tpot_s = None
        if self.first is not None and self.last is not None and self.tokens is not None and self.tokens > 1:
            tpot_s = (self.last - self.first) / (self.tokens - 1)
        return LoadSample(
            scenario=scenario,
            arm=arm,
            scheduled=scheduled,
            start=start,
            ttft_s=None if self.first is None else self.first - self.started,
            tpot_s=tpot_s,
            e2e_s=None if self.ended is None else self.ended - self.started,
            completion_tokens=self.tokens,
            status=self.status,
            http_status=self.http_status,
            error=self.error,
        )


def chat_body(arm: str, chat: Chat, max_tokens: int) -> dict[str, Any]:
    """A greedy streaming request; every field that decides how long the reply is stands in it."""
    return {
        "model": arm,
        "messages": [dict(message) for message in chat],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def ask(client: httpx.Client, body: Mapping[str, Any], watch: StreamWatch) -> None:
    """Posts the request and lets `watch` time the reply; what server and network do wrong ends up in the watch."""
    try:
        with client.stream("POST", PATH, json=body) as response:
            watch.http_status = response.status_code
            if response.status_code != httpx.codes.OK:
                watch.fail(SampleStatus.HTTP_ERROR, response.read().decode(errors="replace"))
                return
            for line in response.iter_lines():
                watch.read(line)
        watch.finish()
    except httpx.TimeoutException as error:
        watch.fail(SampleStatus.TIMEOUT, f"{type(error).__name__}: nothing came for {SILENCE_TIMEOUT_S:g} s")
    except httpx.RequestError as error:
        watch.fail(SampleStatus.CONNECTION, f"{type(error).__name__}: {error}")


def open_client(url: str, verify: ssl.SSLContext, api_key: str | None = None) -> httpx.Client:
    """Returns the one persistent connection of a user. Proxies are left out: they would be part of the measurement."""
    return httpx.Client(
        base_url=url,
        headers={"authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE_S),
        verify=verify,
        trust_env=False,
    )
