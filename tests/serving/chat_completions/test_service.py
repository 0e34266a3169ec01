"""A stream's chunks and the whole reply say the same."""

from __future__ import annotations

import asyncio
import json

import pytest

from serving.chat_completions.protocol import ChatRequest
from serving.chat_completions.service import chunks, plan_chat, reply
from serving.engine.completion import Piece
from serving.engine.engine import FinishReason, TokenLogprob
from serving.engine.text import PlacedToken
from serving.errors import ContextTooLong
from serving.registry.boot import open_registry


@pytest.fixture(scope="module")
def catalog(tiny_base, tiny_adapters):
    return open_registry("base", tiny_base, adapters=tiny_adapters)


def request(**fields) -> ChatRequest:
    return ChatRequest.model_validate({"model": "base", "messages": [{"role": "user", "content": "hi"}], **fields})


def plan_of(catalog, body, context_length=512):
    return plan_chat(body, catalog.resolve(body.model), catalog.base, context_length)


def token(token_id, offset, logprob=-0.5):
    return PlacedToken(offset, TokenLogprob(token_id, logprob, ((token_id, logprob),)))


async def pieces():
    yield Piece(0, "", (), 1, None, None)
    yield Piece(1, "x", (token(70, 0),), 1, None, FinishReason.LENGTH)
    yield Piece(0, "ab", (token(71, 0), token(72, 1, -float("inf"))), 2, None, None)
    yield Piece(0, "", (), 2, None, FinishReason.STOP)


def run_both(catalog, **fields):
    plan = plan_of(catalog, request(n=2, **fields))
    vocabulary = catalog.base.vocabulary

    async def run():
        whole = await reply(plan, pieces(), vocabulary)
        return json.loads(whole.model_dump_json()), [
            json.loads(text) async for text in chunks(plan, pieces(), vocabulary)
        ]

    return asyncio.run(run())


def test_chunks_fold_to_the_reply(catalog):
    whole, parts = run_both(catalog, logprobs=True, top_logprobs=1)
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        entries = [entry for part in own if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]]
        assert own[-1]["finish_reason"]
    assert all("usage" not in part for part in parts)
    assert {part["id"] for part in parts} == {whole["id"]}


def test_usage_comes_last_and_alone_where_asked(catalog):
    whole, parts = run_both(catalog, stream=True, stream_options={"include_usage": True})
    assert parts[-1]["usage"] == whole["usage"]
    assert parts[-1]["choices"] == []
    assert all(part["usage"] is None for part in parts[:-1])
    assert whole["usage"]["completion_tokens"] == 3


def test_an_impossible_logprob_is_openais_number(catalog):
    whole, _ = run_both(catalog, logprobs=True)
    assert whole["choices"][0]["logprobs"]["content"][1]["logprob"] == -9999.0


def test_no_logprobs_are_null(catalog):
    whole, parts = run_both(catalog)
    assert [choice["logprobs"] for choice in whole["choices"]] == [None, None]
    assert all(part["choices"][0]["logprobs"] is None for part in parts)


def test_the_rest_of_the_context_is_the_default(catalog):
    plan = plan_of(catalog, request())
    assert plan.choices[0].request.sampling.max_tokens == 512 - plan.prompt_tokens
    assert plan.choices[0].request.sampling.temperature == 1.0
    for field in ("max_tokens", "max_completion_tokens"):
        assert plan_of(catalog, request(**{field: 7})).choices[0].request.sampling.max_tokens == 7


def test_the_plan_names_the_real_revision(catalog):
    plan = plan_of(catalog, request(model="starter"))
    starter = catalog.resolve("starter")
    assert plan.choices[0].request.variant == starter.variant
    assert plan.identity.headers(None) == {"x-adapter-revision": starter.revision}
    assert plan.identity.fingerprint.endswith(starter.digest)
    assert plan_of(catalog, request()).identity.headers(None) == {}


def test_what_cannot_be_planned_is_refused(catalog):
    with pytest.raises(ContextTooLong):
        plan_of(catalog, request(), 8)
