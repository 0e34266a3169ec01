"""The ids are those that a completion of the same text or chat would read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serving.chat_completions.protocol import ChatRequest
from serving.chat_completions.service import plan_chat
from serving.completions.protocol import CompletionRequest
from serving.completions.service import plan_completion
from serving.errors import BadRequest
from serving.registry.boot import open_registry
from serving.tokenize.protocol import TokenizeRequest
from serving.tokenize.service import tokenize

CHAT = [{"role": "user", "content": "a <|im_end|> fox"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def catalog(tiny_base):
    return open_registry("base", tiny_base)


def model(catalog):
    return catalog.resolve("base"), catalog.base


def ids(catalog, **fields):
    response = tokenize(TokenizeRequest.model_validate({"model": "base", **fields}), *model(catalog), 512)
    assert (response.count, response.max_model_len) == (len(response.tokens), 512)
    return response.tokens


def test_a_chat_has_the_ids_of_its_completion(catalog):
    chat = plan_chat(ChatRequest.model_validate({"model": "base", "messages": CHAT[:1]}), *model(catalog), 512)
    assert ids(catalog, messages=CHAT[:1]) == list(chat.choices[0].request.prompt_ids)


def test_a_prompt_has_the_ids_of_its_completion(catalog):
    plan = plan_completion(CompletionRequest.model_validate({"model": "base", "prompt": "a fox"}), *model(catalog), 512)
    assert ids(catalog, prompt="a fox") == list(plan.choices[0].request.prompt_ids)
    assert ids(catalog, prompt="") == []


def test_the_prompt_is_a_prefix_of_the_finished_chat(catalog):
    prompt = ids(catalog, messages=CHAT[:1])
    whole = ids(catalog, messages=CHAT, add_generation_prompt=False)
    assert whole[: len(prompt)] == prompt
    assert len(whole) > len(prompt)


@pytest.mark.parametrize(
    "fields", [{}, {"prompt": "a", "messages": CHAT}, {"prompt": "a", "add_generation_prompt": True}]
)
def test_exactly_one_input(fields):
    with pytest.raises(BadRequest):
        TokenizeRequest.model_validate({"model": "base", **fields})


def test_an_empty_chat_is_refused():
    with pytest.raises(ValidationError):
        TokenizeRequest.model_validate({"model": "base", "messages": []})
