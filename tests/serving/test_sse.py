"""A stream ends in [DONE] only where it succeeded, and its source is always closed."""

from __future__ import annotations

import asyncio
import json

import pytest

from serving.errors import EngineDead
from serving.middleware import RequestFacts
from serving.sse import DONE, EventStream, encode, events


class Source:
    """Yields `texts`, then raises `error` if there is one; remembers that it was closed."""

    def __init__(self, texts, error=None):
        self.closed = False
        self._texts, self._error = texts, error

    async def run(self):
        try:
            for text in self._texts:
                yield text
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


def collect(source, heard=None):
    async def run():
        return [event async for event in events(source.run(), (heard if heard is not None else []).append)]

    return asyncio.run(run())


def test_success_ends_in_done():
    source = Source(["{}", '{"a": "🦊"}'])
    assert collect(source) == [b"data: {}\n\n", 'data: {"a": "🦊"}\n\n'.encode(), DONE]
    assert source.closed


def test_no_character_of_a_text_ends_a_line_for_any_client():
    text = json.dumps("a\x85b\u2028c\u2029d\U0001f98ae\r\n", ensure_ascii=False)
    (event, _) = collect(Source([text]))
    assert len(event.decode().splitlines()) == 2, "one line, and an empty one"
    assert json.loads(event.removeprefix(b"data: ")) == json.loads(text)


def test_an_error_after_the_first_event_is_an_event_and_no_done():
    heard = []
    found = collect(Source(["{}"], EngineDead("it died")), heard)
    assert len(found) == 2
    assert json.loads(found[1].removeprefix(b"data: "))["error"]["code"] == "engine_dead"
    assert [error.code for error in heard] == ["engine_dead"]


def test_an_unexpected_error_tells_nothing_of_itself(caplog):
    found = collect(Source(["{}"], ZeroDivisionError("secret")))
    assert b"internal_error" in found[1]
    assert b"secret" not in found[1]
    assert "secret" in caplog.text


def test_an_error_before_the_first_event_is_raised():
    source = Source([], EngineDead("it died"))
    with pytest.raises(EngineDead):
        collect(source)
    assert source.closed


def test_a_client_that_leaves_closes_the_source():
    async def run():
        source = Source([str(number) for number in range(1000)])
        stream = events(source.run(), lambda error: None)
        first = await anext(stream)
        sent = []

        async def send(message):
            sent.append(message)
            await asyncio.sleep(0.01)

        async def receive():
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        scope = {"state": {"facts": RequestFacts("id")}}
        await EventStream(first, stream, {"x-a": "b"})(scope, receive, send)
        assert source.closed
        assert scope["state"]["facts"].client_left
        assert sent[1]["body"] == encode("0")
        headers = dict(sent[0]["headers"])
        assert headers[b"x-a"] == b"b"
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert b"content-length" not in headers

    asyncio.run(run())


def test_a_client_that_reads_nothing_keeps_nothing_past_its_deadline():
    async def run():
        source = Source([str(number) for number in range(1000)])
        stream = events(source.run(), lambda error: None)
        first, sent = await anext(stream), []

        async def send(message):
            sent.append(message)
            if len(sent) > 2:
                await asyncio.Event().wait()  # the socket takes no more

        async def receive():
            await asyncio.Event().wait()

        facts = RequestFacts("id", timeout_s=0.01)
        await EventStream(first, stream, {}, grace_s=0.02)({"state": {"facts": facts}}, receive, send)
        assert source.closed
        assert (facts.stream_error, facts.client_left) == ("slow_reader", False)

    asyncio.run(asyncio.wait_for(run(), 20))
