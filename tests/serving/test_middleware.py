"""Every answer has an id and a log line, no body over the limit gets in, and no error gets out without an envelope."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from serving.auth import Caller
from serving.errors import NotReady, Unauthorised
from serving.metrics import Metrics
from serving.middleware import BodyLimit, JsonBodies, RequestFacts, RequestRecorder, error_response


def call(app, *, body=(b"",), headers=(), path="/x", method="POST"):
    """Runs one ASGI request; returns the messages that the app sent."""
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    parts[-1]["more_body"] = False
    sent = []

    async def receive():
        return parts.pop(0) if parts else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(app(scope, receive, send))
    return sent


async def echo(scope, receive, send):
    """Answers with what it received, and with what comes after the body."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def broken(scope, receive, send):
    raise ZeroDivisionError("secret")


def header(sent, name):
    return dict(sent[0]["headers"]).get(name, b"").decode()


def recorder(app):
    return RequestRecorder(app, Metrics(lambda: None))


def test_a_body_is_replayed_whole_and_the_disconnect_after_it():
    assert call(recorder(BodyLimit(echo, 10)), body=(b"abc", b"def", b""))[1]["body"] == b"abcdef"
    assert call(recorder(BodyLimit(echo, 3)), body=(b"abc",))[1]["body"] == b"abc"


@pytest.mark.parametrize("headers", [(), ((b"content-length", b"11"),)])
def test_a_body_over_the_limit_is_413_announced_or_not(headers):
    sent = call(recorder(BodyLimit(broken, 10)), body=(b"abcdef", b"ghijk"), headers=headers)
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_large"


def test_a_sane_request_id_is_kept_and_another_replaced():
    assert header(call(recorder(echo), headers=[(b"x-request-id", b"abc-1.2_3:4")]), b"x-request-id") == "abc-1.2_3:4"
    for insane in (b"", b"a b", b"x" * 129, b"a\xff", b'"}'):
        assert header(call(recorder(echo), headers=[(b"x-request-id", insane)]), b"x-request-id").startswith("req-")


def test_an_unexpected_error_is_a_500_that_tells_nothing(caplog):
    sent = call(recorder(broken))
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["code"] == "internal_error"
    assert b"secret" not in sent[1]["body"]
    assert header(sent, b"x-request-id") in caplog.text


def test_an_error_after_the_status_is_raised_so_that_the_connection_is_cut():
    async def late(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(recorder(late))


def test_the_log_line_is_json_without_message_text(caplog):
    with caplog.at_level(logging.INFO, logger="graft.access"):
        call(recorder(echo), body=(b"my secret",), headers=[(b"x-request-id", b"id-1")], path='/a"b')
    line = json.loads(caplog.records[-1].getMessage())
    assert (line["request_id"], line["status"], line["path"], line["method"]) == ("id-1", 200, '/a"b', "POST")
    assert "secret" not in caplog.text


def test_the_log_line_says_whose_key_which_arm_and_how_long_it_waited(caplog):
    async def answered(scope, receive, send):
        facts = scope["state"]["facts"]
        facts.caller, facts.model, facts.arm, facts.queue_s = Caller("ann"), "starter", "canary", 0.12345678
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with caplog.at_level(logging.INFO, logger="graft.access"):
        call(recorder(answered))
    line = json.loads(caplog.records[-1].getMessage())
    assert {name: line[name] for name in ("key", "model", "arm", "queue_s")} == {
        "key": "ann",
        "model": "starter",
        "arm": "canary",
        "queue_s": 0.123457,
    }


def test_a_stream_that_broke_is_counted_whatever_broke_it():
    async def cut(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        scope["state"]["facts"].stream_error = "slow_reader"

    metrics = Metrics(lambda: None)
    call(RequestRecorder(cut, metrics))
    assert b'graft_stream_errors_total{arm="",code="slow_reader",model=""} 1.0' in metrics.exposition()


def test_the_time_that_is_left_counts_from_the_arrival():
    facts = RequestFacts("id")
    assert facts.left_s() is None
    facts.timeout_s = 5.0
    assert 0 < facts.left_s() < 5
    facts.arrived_s -= 6
    assert facts.left_s() < 0


def test_a_retry_is_invited_where_it_helps():
    response = error_response(NotReady("wait \ud800"))
    assert response.status_code == 503
    assert 0 < int(response.headers["retry-after"]) <= 120
    assert response.body.isascii()
    assert "www-authenticate" not in response.headers
    assert error_response(Unauthorised("no key")).headers["www-authenticate"].startswith("Bearer")


def test_the_times_that_are_known_at_the_status_are_a_header():
    async def timed(scope, receive, send):
        facts = scope["state"]["facts"]
        facts.queue_s, facts.ttft_s = 0.00104, 1.5
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    assert header(call(recorder(timed)), b"server-timing") == "queue;dur=1.0, ttft;dur=1500.0"
    assert b"server-timing" not in dict(call(recorder(echo))[0]["headers"])


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (b"application/x-www-form-urlencoded", "application/json"),
        (b"application/x-www-form-urlencoded; charset=utf-8", "application/json"),
        (b"application/json", "application/json"),
        (b"text/plain", "text/plain"),
    ],
)
def test_a_body_that_curl_labels_a_form_is_read_as_json(given, seen):
    async def content_type(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": scope["headers"]})

    assert header(call(JsonBodies(content_type), headers=[(b"content-type", given)]), b"content-type") == seen
