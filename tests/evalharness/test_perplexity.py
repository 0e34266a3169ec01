from __future__ import annotations

import asyncio
import math

import pytest

from evalharness.client import Client, Reply
from evalharness.perplexity import Span, TurnEnd, find_turn_end, reply_nll, reply_span, score_reference, turn_end
from evalharness.records import Record, SampleStatus
from tests.evalharness.endpoint import IM_END, NEWLINE, Answer, better_adapter, chat_ids, samples, serve


def score(handle, arm: str = "base", count: int = 1) -> list[Record]:
    async def all_of_them(url: str) -> list[Record]:
        async with Client(url, timeout_s=5) as client:
            end = await find_turn_end(client, arm)
            return [await score_reference(client, sample, arm, end) for sample in samples(count)]

    with serve(handle) as url:
        return asyncio.run(all_of_them(url))


def test_the_turn_end_is_what_two_chats_share_at_their_end():
    assert turn_end([1, 5, 6, 2, 10], [1, 7, 2, 10]) == TurnEnd((2, 10))
    assert turn_end([1, 5], [1, 7]) is None


def test_the_span_is_the_reply_and_its_end_of_turn():
    assert reply_span([1, 4], [1, 4, 7, 8, 2, 10], TurnEnd((2, 10))) == Span(2, 5)
    assert reply_span([1, 4], [1, 4, 2, 10], TurnEnd((2, 10))) == Span(2, 3)


@pytest.mark.parametrize(
    ("prompt", "chat"), [([1, 5], [1, 4, 7, 2, 10]), ([1, 4], [1, 4, 7, 2]), ([1, 2], [1, 2, 10]), ([1], [1])]
)
def test_a_chat_that_is_not_prompt_reply_and_end_is_refused(prompt, chat):
    with pytest.raises(ValueError, match="ids do not"):
        reply_span(prompt, chat, TurnEnd((2, 10)))


def test_the_nll_counts_the_span_and_nothing_else():
    assert reply_nll([None, -100.0, -1.0, -2.0, -0.5], Span(2, 5)) == pytest.approx(3.5)


@pytest.mark.parametrize("bad", [None, -math.inf, math.nan, -9999.0])
def test_a_position_without_a_finite_logprob_is_refused(bad):
    with pytest.raises(ValueError, match="position 2"):
        reply_nll([None, -1.0, bad, -1.0], Span(1, 4))


def test_another_number_of_logprobs_than_tokens_is_refused():
    with pytest.raises(ValueError, match="3 log-probabilities for 4"):
        reply_nll([None, -1.0, -1.0], Span(1, 4))


def test_over_http_every_reply_token_and_the_end_of_turn_are_scored():
    found = score(better_adapter(), count=3)
    for record, sample in zip(found, samples(3), strict=True):
        assert record.status is SampleStatus.OK
        assert record.nll_tokens == len(sample.reference or "") + 1
        assert record.nll_nats == pytest.approx(2.0 * record.nll_tokens)


def test_what_is_sent_ends_with_the_end_of_turn():
    server, prompts = better_adapter(), []

    def handle(path, body):
        prompts.append(body.get("prompt"))
        return server(path, body)

    score(handle)
    sent = [prompt for prompt in prompts if prompt]
    assert len(sent) == 2
    assert all(prompt[-1] == IM_END for prompt in sent)


def test_a_server_for_chats_alone_is_unavailable_with_its_reason():
    server = better_adapter()
    server.chat_only = True
    (record,) = score(server)
    assert record.status is SampleStatus.UNAVAILABLE
    assert record.nll_nats is None
    assert "/tokenize" in (record.error or "")


def test_a_server_that_cannot_echo_is_unavailable_with_its_reason():
    server = better_adapter()

    def handle(path, body):
        refusal = Answer({"error": {"message": "echo is not supported"}}, 400)
        return refusal if path == "/v1/completions" else server(path, body)

    (record,) = score(handle)
    assert record.status is SampleStatus.UNAVAILABLE
    assert "echo is not supported" in (record.error or "")


def test_a_template_that_rewrites_the_prompt_is_unavailable():
    server = better_adapter()

    def handle(path, body):
        if path != "/tokenize":
            return server(path, body)
        ids = chat_ids(body["messages"], body["add_generation_prompt"])
        return Answer({"tokens": [99, *ids] if body["add_generation_prompt"] else ids})

    (record,) = score(handle)
    assert record.status is SampleStatus.UNAVAILABLE
    assert "rewrites" in (record.error or "")


def test_a_server_that_fails_for_now_is_not_called_unavailable():
    (record,) = score(lambda path, body: Answer({}, 500))
    assert record.status is SampleStatus.HTTP_ERROR


def test_the_probe_is_a_turn_end_where_all_is_well():
    async def probe(url: str) -> TurnEnd | Reply:
        async with Client(url, timeout_s=5) as client:
            return await find_turn_end(client, "base")

    with serve(better_adapter()) as url:
        assert asyncio.run(probe(url)) == TurnEnd((IM_END, NEWLINE))
