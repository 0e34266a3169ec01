"""The event stream: JSON texts as server-sent events, ended by [DONE] or by one error event."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.disconnect import unless_gone
from serving.errors import ClientClosed, GraftError

logger = logging.getLogger("graft.sse")
DONE = b"data: [DONE]\n\n"
SLOW_READER_S = 30.0


# They stand in JSON's strings as they are, and some clients, httpx's lines among them, would cut an event there.
_LINE_ENDS = str.maketrans({character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"})


def encode(text: str) -> bytes:
    """Returns the event of a JSON text."""
    return b"data: " + (text if text.isascii() else text.translate(_LINE_ENDS)).encode() + b"\n\n"


async def events(
    texts: AsyncGenerator[str, None], on_error: Callable[[GraftError], None]
) -> AsyncGenerator[bytes, None]:
    """Yields an event a text, then [DONE]. An error before the first is raised, since it can still be a status."""
    begun = False
    try:
        async with aclosing(texts):
            async for text in texts:
                yield encode(text)
                begun = True
    except Exception as error:
        if not begun:
            raise
        yield _error_event(error, on_error)
    else:
        yield DONE


def _error_event(error: Exception, on_error: Callable[[GraftError], None]) -> bytes:
    if not isinstance(error, GraftError):
        logger.error("a stream failed", exc_info=error)
        error = GraftError("the server failed while it answered; this is a bug, its log has the details")
    on_error(error)
    return encode(json.dumps(error.envelope()))


class EventStream(Response):
    """Sends `first`, then the rest; closes the generator when it ends and when the client leaves.

    What was made by the request's deadline may be read for `grace_s` more: a client that reads nothing keeps nothing.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        grace_s: float = SLOW_READER_S,
    ) -> None:
        # Proxies must neither keep nor gather the events.
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._grace_s = grace_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        facts = scope["state"]["facts"]
        left_s = facts.left_s()
        try:
            async with asyncio.timeout(None if left_s is None else left_s + self._grace_s), unless_gone(receive):
                await self._send(send)
        except ClientClosed:
            facts.client_left = True
        except TimeoutError:  # the connection is cut: its answer is not whole
            facts.stream_error = "slow_reader"
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._rest:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
