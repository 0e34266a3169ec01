from __future__ import annotations

import asyncio
import email.utils
import socket
import time
from datetime import UTC, datetime, timedelta

import pytest

from evalharness import client as client_module
from evalharness.client import MAX_TRIES, Client, Reply, is_loopback, normalise_url
from evalharness.errors import ServerError
from evalharness.records import SampleStatus
from tests.evalharness.endpoint import Answer, serve


def post(url: str, timeout_s: float = 5.0) -> Reply:
    async def once() -> Reply:
        async with Client(url, timeout_s=timeout_s) as client:
            return await client.post("/v1/chat/completions", {})

    return asyncio.run(once())


def scripted(*answers: Answer):
    """Returns a handler that gives the answers in turn, the last again and again, and its list of call times."""
    calls: list[float] = []

    def handle(path, body):
        calls.append(time.monotonic())
        return answers[min(len(calls), len(answers)) - 1]

    return handle, calls


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.01)


def test_a_reply_carries_body_latency_and_request_id():
    handle, _ = scripted(Answer({"a": 1}, headers={"x-request-id": "r1"}))
    with serve(handle) as url:
        reply = post(url)
    assert (reply.status, reply.body, reply.request_id, reply.tries) == (SampleStatus.OK, {"a": 1}, "r1", 1)
    assert reply.latency_s is not None
    assert reply.latency_s > 0


@pytest.mark.parametrize("status", [429, 503])
def test_busy_servers_are_asked_again(status):
    handle, calls = scripted(Answer({}, status), Answer({}, status), Answer({"a": 1}))
    with serve(handle) as url:
        reply = post(url)
    assert (reply.status, reply.tries, len(calls)) == (SampleStatus.OK, 3, 3)


def test_retries_are_bounded():
    handle, calls = scripted(Answer({"error": {"message": "full"}}, 429))
    with serve(handle) as url:
        reply = post(url)
    assert (reply.status, reply.tries, len(calls)) == (SampleStatus.HTTP_ERROR, MAX_TRIES, MAX_TRIES)
    assert reply.error == "HTTP 429: full"


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_waited_for(date):
    when = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    handle, calls = scripted(Answer({}, 503, {"retry-after": when if date else "1"}), Answer({}))
    with serve(handle) as url:
        assert post(url).status is SampleStatus.OK
    assert calls[1] - calls[0] >= 0.8


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Answer({"error": {"message": "bad"}}, 400), SampleStatus.REFUSED),
        (Answer({"error": "gone"}, 404), SampleStatus.REFUSED),
        (Answer(b"<html>", 500), SampleStatus.HTTP_ERROR),
        (Answer(b"<html>", 502), SampleStatus.HTTP_ERROR),
        (Answer(b"<html>"), SampleStatus.INVALID_REPLY),
        (Answer([1]), SampleStatus.INVALID_REPLY),
        (Answer(b"no gzip", headers={"content-encoding": "gzip"}), SampleStatus.INVALID_REPLY),
    ],
)
def test_every_other_failure_has_its_status_and_is_asked_once(answer, status):
    handle, calls = scripted(answer)
    with serve(handle) as url:
        reply = post(url)
    assert (reply.status, reply.body, len(calls)) == (status, None, 1)
    assert reply.error


def test_a_late_reply_is_a_timeout_asked_once():
    calls = []

    def handle(path, body):
        calls.append(path)
        time.sleep(0.6)
        return Answer({})

    with serve(handle) as url:
        reply = post(url, timeout_s=0.2)
    assert (reply.status, len(calls)) == (SampleStatus.TIMEOUT, 1)


def test_a_reply_that_trickles_in_is_a_timeout_too():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def trickle() -> Reply:
            loop = asyncio.get_running_loop()
            listener.setblocking(False)
            async with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5) as client:
                asking = asyncio.create_task(client.post("/", {}))
                connection, _ = await loop.sock_accept(listener)
                with connection:
                    await loop.sock_sendall(connection, b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
                    while not asking.done():
                        await loop.sock_sendall(connection, b" ")
                        await asyncio.sleep(0.05)
                    return await asking

        assert asyncio.run(trickle()).status is SampleStatus.TIMEOUT


def test_no_server_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    reply = post(f"http://127.0.0.1:{port}")
    assert (reply.status, reply.tries) == (SampleStatus.UNREACHABLE, MAX_TRIES)


@pytest.fixture
def proxy(monkeypatch):
    """The paths that a proxy of the environment was asked for."""
    asked: list[str] = []

    def handle(path, body):
        asked.append(path)
        return Answer({"from": "proxy"})

    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serve(handle) as url:
        monkeypatch.setenv("HTTP_PROXY", url)
        yield asked


def test_this_machines_server_is_asked_without_a_proxy(proxy):
    handle, _ = scripted(Answer({"from": "server"}))
    with serve(handle) as url:
        assert post(url).body == {"from": "server"}
    assert proxy == []


def test_another_machines_server_is_asked_through_the_proxy(proxy):
    assert post("http://model.invalid:8000").body == {"from": "proxy"}
    assert proxy == ["http://model.invalid:8000/v1/chat/completions"]


@pytest.mark.parametrize(
    ("host", "own"),
    [("localhost", True), ("127.8.0.1", True), ("::1", True), ("192.0.2.1", False), ("127.0.0.1.example.org", False)],
)
def test_loopback_is_this_machine(host, own):
    assert is_loopback(host) == own


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_url_may_end_in_v1(url):
    assert normalise_url(url) == "http://h:1"


@pytest.mark.parametrize(
    "url", ["h:1", "ftp://h", "http://", "http://user:secret@h", "http://h?key=secret", "http://h:x", "http://[::1"]
)
def test_a_url_that_is_none_or_carries_secrets_is_refused(url):
    with pytest.raises(ServerError, match="--url") as caught:
        normalise_url(url)
    assert "secret@" not in str(caught.value)
