"""The middlewares: request id, access log, last resort for errors, body limit and type; plain ASGI, for streams."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.auth import Caller
from serving.errors import BodyTooLarge, BodyTooSlow, GraftError
from serving.metrics import Metrics

access_logger = logging.getLogger("graft.access")
logger = logging.getLogger("graft.app")
_FORM = "application/x-www-form-urlencoded"
READ_S = 60.0  # for a whole body: the largest comes at half a megabit a second
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class RequestFacts:
    """What is known of one request by its end; never message text. Lives in the scope's state."""

    request_id: str
    arrived_s: float = field(default_factory=time.perf_counter)
    status: int | None = None
    body_bytes: int = 0  # known once it is read
    caller: Caller | None = None  # set before any route runs
    timeout_s: float | None = None  # from the arrival to the end of the answer
    model: str = ""  # a name from the registry
    arm: str = ""  # the label that routed to a revision
    revision: str = ""  # what answered, as the response calls it
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    stream_error: str | None = None
    client_left: bool = False
    planned_s: float | None = None  # from the arrival to the queue
    queue_s: float | None = None  # from the arrival to a row in the batch
    ttft_s: float | None = None
    total_s: float | None = None

    def left_s(self) -> float | None:
        """Returns how long the answer may take from now; None: as long as it needs."""
        return None if self.timeout_s is None else self.arrived_s + self.timeout_s - time.perf_counter()

    def note_stream_error(self, error: GraftError) -> None:
        self.stream_error = error.code

    def server_timing(self) -> str:
        """Returns what is known now, as the Server-Timing header writes it; a stream's total is not, at its status."""
        known = {"queue": self.queue_s, "ttft": self.ttft_s, "total": self.total_s}
        return ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in known.items() if value is not None)


def facts_of(request: Request) -> RequestFacts:
    facts: RequestFacts = request.scope["state"]["facts"]
    return facts


def error_response(error: GraftError) -> Response:
    """Writes OpenAI's envelope, in ASCII, so that no broken character of a request can break its answer."""
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    return Response(json.dumps(error.envelope()), error.status, headers, "application/json")


class RequestRecorder:
    """Names each request, writes its log line, counts it, and answers 500 where the app raised."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts = RequestFacts(_request_id(Headers(scope=scope).get("x-request-id", "")))
        scope.setdefault("state", {})["facts"] = facts

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = facts.request_id
                if timing := facts.server_timing():
                    headers["server-timing"] = timing
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception:
            logger.exception("request %s failed", facts.request_id)
            if facts.status is not None:  # too late for another answer: the server cuts the connection
                raise
            bug = GraftError("the server failed; this is a bug, its log has the details under this x-request-id")
            await error_response(bug)(scope, receive, send_named)
        finally:
            self._record(scope, facts)

    def _record(self, scope: Scope, facts: RequestFacts) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        status = "cancelled" if facts.status is None else str(facts.status)
        self._metrics.requests.labels(route, facts.model, facts.arm, status).inc()
        if facts.stream_error is not None:
            self._metrics.stream_errors.labels(facts.model, facts.arm, facts.stream_error).inc()
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "event": "request",
            "request_id": facts.request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": facts.status,
            "seconds": round(time.perf_counter() - facts.arrived_s, 6),
            "key": None if facts.caller is None else facts.caller.name,
            "model": facts.model or None,
            "arm": facts.arm or None,
            "prompt_tokens": facts.prompt_tokens,
            "completion_tokens": facts.completion_tokens,
            "queue_s": None if facts.queue_s is None else round(facts.queue_s, 6),
            "stream_error": facts.stream_error,
            "client_left": facts.client_left or None,
        }
        access_logger.info(json.dumps({key: value for key, value in line.items() if value is not None}))


class BodyLimit:
    """Reads a body before the app does.

    Answers 413 where it is over the limit, announced or not, and 408 where it is not there after READ_S or the time
    that the request may take: a client that sends a byte now and then holds nothing for long.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = int(Headers(scope=scope).get("content-length", "0"))
        facts: RequestFacts = scope["state"]["facts"]
        try:
            self._check(announced)
            messages = await self._read(receive, facts)
        except (BodyTooLarge, BodyTooSlow) as error:
            await error_response(error)(scope, receive, send)
            return
        replay = iter(messages)

        async def receive_again() -> Message:
            return next(replay, None) or await receive()

        await self._app(scope, receive_again, send)

    async def _read(self, receive: Receive, facts: RequestFacts) -> list[Message]:
        messages: list[Message] = []
        left_s = facts.left_s()
        within_s = READ_S if left_s is None else min(READ_S, left_s)
        try:
            async with asyncio.timeout(within_s):
                while not messages or messages[-1].get("more_body", False):  # a disconnect has no more
                    messages.append(await receive())
                    facts.body_bytes += len(messages[-1].get("body", b""))
                    self._check(facts.body_bytes)
        except TimeoutError:
            raise BodyTooSlow(
                f"{facts.body_bytes} bytes of the body came in {within_s:.3g} s, and not the whole; send it faster, or "
                "a smaller one"
            ) from None
        return messages

    def _check(self, size: int) -> None:
        if size > self._limit_bytes:
            raise BodyTooLarge(f"the body has more than {self._limit_bytes} bytes, the limit; send a smaller one")


class JsonBodies:
    """Has a body that is labelled a form read as JSON: `curl -d` labels it so, and no route takes a form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and Headers(scope=scope).get("content-type", "").startswith(_FORM):
            headers = MutableHeaders(raw=list(scope["headers"]))
            headers["content-type"] = "application/json"
            scope["headers"] = headers.raw  # in place: the recorder reads the route that the router leaves in the scope
        await self._app(scope, receive, send)


def _request_id(given: str) -> str:
    return given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
