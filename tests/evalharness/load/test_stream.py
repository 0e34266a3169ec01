"""One streamed completion: true timings, and every failure by name."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import httpx
import pytest

from evalharness.load.sample import SampleStatus
from evalharness.load.stream import StreamWatch, ask, chat_body, open_client

CHAT = ({"role": "user", "content": "Say something."},)
FEW_TOKENS_S = 0.3  # three of the slow server's gaps; a buffering client would be seven late


@pytest.fixture
def client(slow_server) -> Iterator[httpx.Client]:
    with open_client(slow_server.url, ssl.create_default_context()) as client:
        yield client


def asked(client) -> StreamWatch:
    watch = StreamWatch()
    ask(client, chat_body("base", CHAT, 64), watch)
    return watch


def test_ttft_is_the_first_content_delta_and_not_the_role_or_a_full_buffer(client, slow_server):
    sample = asked(client).sample("alone", "base", start=1000.0, scheduled=None)
    assert sample.status is SampleStatus.OK
    assert slow_server.ttft_s[0] <= sample.ttft_s < slow_server.ttft_s[0] + FEW_TOKENS_S
    assert sample.e2e_s > sample.ttft_s + 0.8


def test_tpot_is_the_mean_gap_between_tokens_of_usage(client):
    sample = asked(client).sample("alone", "base", start=1000.0, scheduled=None)
    assert sample.completion_tokens == 10
    assert 0.09 < sample.tpot_s < 0.2
    assert sample.tpot_s * 9 == pytest.approx(sample.e2e_s - sample.ttft_s, abs=0.1)


def test_the_request_streams_with_usage_and_fixes_its_sampling(client, slow_server):
    asked(client)
    (body,) = slow_server.bodies
    assert body["model"] == "base"
    assert body["stream_options"] == {"include_usage": True}
    assert (body["stream"], body["temperature"], body["max_tokens"]) == (True, 0, 64)


def test_the_key_is_sent_where_there_is_one(slow_server):
    for key in (None, "k-secret"):
        with open_client(slow_server.url, ssl.create_default_context(), key) as client:
            asked(client)
    assert slow_server.authorizations == [None, "Bearer k-secret"]


def test_one_user_keeps_one_connection(client, slow_server):
    for _ in range(3):
        asked(client)
    assert len(slow_server.connections) == 1


@pytest.mark.parametrize(
    ("mode", "status", "says"),
    [
        ("busy", SampleStatus.HTTP_ERROR, "too many requests"),
        ("error", SampleStatus.STREAM_ERROR, "the engine died"),
        ("broken", SampleStatus.BROKEN_STREAM, "before [DONE]"),
    ],
)
def test_each_failure_has_its_kind_and_its_words(client, slow_server, mode, status, says):
    slow_server.mode = mode
    watch = asked(client)
    assert watch.status is status
    assert says in watch.error
    assert watch.ended is not None


def test_an_empty_reply_is_whole_and_has_no_ttft(client, slow_server):
    slow_server.mode = "empty"
    sample = asked(client).sample("alone", "base", start=1000.0, scheduled=None)
    assert (sample.status, sample.ttft_s, sample.tpot_s) == (SampleStatus.OK, None, None)
    assert sample.e2e_s > 0


def test_a_refused_connection_is_a_sample_and_no_exception():
    with open_client("http://127.0.0.1:1", ssl.create_default_context()) as client:
        watch = asked(client)
    assert watch.status is SampleStatus.CONNECTION
    assert watch.http_status is None


def test_a_request_cut_off_midway_keeps_what_it_had():
    ticks = iter([10.0, 10.5, 11.0])
    watch = StreamWatch(clock=lambda: next(ticks))
    watch.read('data: {"choices": [{"delta": {"content": "a"}}]}')
    watch.read('data: {"choices": [{"delta": {"content": "b"}}]}')
    sample = watch.sample("alone", "base", start=1000.0, scheduled=999.0)
    assert (sample.status, sample.ttft_s, sample.e2e_s) == (SampleStatus.CUT_OFF, 0.5, None)
    assert sample.queued_s == 1.0
    assert sample.tpot_s is None


def test_what_is_no_chunk_breaks_the_stream():
    watch = StreamWatch()
    watch.read(": a comment is no data")
    assert watch.ended is None
    watch.read("data: <html>")
    assert watch.status is SampleStatus.BROKEN_STREAM
