"""Prompts become choices in OpenAI's order, and chunks fold to the whole response."""

from __future__ import annotations

import asyncio
import json

import pytest

from serving.completions.protocol import CompletionRequest
from serving.completions.service import chunks, completion, encode_prompt, plan_completion
from serving.engine.completion import complete_all
from serving.engine.fake_engine import FakeEngine
from serving.errors import BadRequest, ContextTooLong
from serving.registry.boot import open_registry


@pytest.fixture(scope="module")
def catalog(tiny_base):
    return open_registry("base", tiny_base)


def plan_of(catalog, **fields):
    body = CompletionRequest.model_validate({"model": "base", "prompt": "the fox", "temperature": 0, **fields})
    return plan_completion(body, catalog.resolve("base"), catalog.base, 512)


def run_both(catalog, **fields):
    plan = plan_of(catalog, **fields)
    vocabulary = catalog.base.vocabulary

    async def run():
        engine = FakeEngine(context_length=512, vocabulary_size=400)
        await engine.start()
        await engine.add(catalog.resolve("base").variant)
        whole = await completion(plan, complete_all(engine, vocabulary, plan.choices), vocabulary)
        pieces = complete_all(engine, vocabulary, plan.choices)
        return json.loads(whole.model_dump_json()), [
            json.loads(text) async for text in chunks(plan, pieces, vocabulary)
        ]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 5},
        {"max_tokens": 5, "logprobs": 2},
        {"max_tokens": 5, "logprobs": 2, "echo": True},
        {"max_tokens": 0, "logprobs": 0, "echo": True},
        {"max_tokens": 0, "echo": True},
        {"prompt": ["the fox", "a 🦊"], "n": 2, "logprobs": 1, "echo": True, "max_tokens": 3},
    ],
)
def test_chunks_fold_to_the_whole(catalog, fields):
    whole, parts = run_both(catalog, **fields)
    assert len(whole["choices"]) == len(plan_of(catalog, **fields).choices)
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"] == "length"
        if "logprobs" in fields:
            for key, values in choice["logprobs"].items():
                assert [value for part in own for value in part["logprobs"][key]] == values
        else:
            assert choice["logprobs"] is None


def test_choices_go_prompt_by_prompt(catalog):
    plan = plan_of(catalog, prompt=["a", "b"], n=2)
    a, b = catalog.base.tokenizer.encode("a"), catalog.base.tokenizer.encode("b")
    assert [list(choice.request.prompt_ids) for choice in plan.choices] == [a, a, b, b]
    assert plan.prompt_tokens == len(a) + len(b)


def test_defaults_are_openais(catalog):
    sampling = plan_of(catalog, temperature=None).choices[0].request.sampling
    assert (sampling.max_tokens, sampling.temperature) == (16, 1.0)


def test_scoring_is_asked_for_only_with_echo(catalog):
    assert plan_of(catalog, logprobs=3).choices[0].request.prompt_logprobs is None
    assert plan_of(catalog, logprobs=3, echo=True).choices[0].request.prompt_logprobs == 3
    assert plan_of(catalog, echo=True).choices[0].request.prompt_logprobs is None


def test_ids_outside_the_vocabulary_and_empty_prompts_are_named(catalog):
    for prompt, message in (
        ((1, 400), r"prompt\[0\]: id 400 is not among 0 to 399"),
        ((-1,), "id -1"),
        ("", "no tokens"),
    ):
        with pytest.raises(BadRequest, match=message):
            encode_prompt(prompt, catalog.base, "prompt[0]")
    with pytest.raises(ContextTooLong):
        plan_of(catalog, prompt=[5] * 513)
