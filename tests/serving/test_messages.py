"""A chat is rendered as its model was trained to read it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from pydantic import ValidationError

from serving.errors import BadRequest
from serving.messages import ChatMessage, render
from serving.registry.boot import open_registry
from tests.serving.bad_inputs import CALLING, RESULT
from training.chat import Message, ToolCall, render_chat, render_prompt


@pytest.fixture(scope="module")
def catalog(tiny_base):
    return open_registry("base", tiny_base)


def message(**fields):
    return ChatMessage.model_validate(fields)


def test_developer_is_system_and_parts_are_joined():
    assert message(role="developer", content="be brief").to_message() == Message("system", "be brief")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert message(role="user", content=parts, name="ann").to_message() == Message("user", "a\nb")


@pytest.mark.parametrize(
    "content", [[], [{"type": "image_url", "image_url": {}}], [{"type": "text"}], ["a"], 5, None, {"type": "text"}]
)
def test_content_that_is_no_text_is_refused(content):
    with pytest.raises(ValidationError):
        message(role="user", content=content)


@pytest.mark.parametrize("key", ["cache_control", "annotations", "\ud800"])
def test_a_key_of_a_part_that_would_be_dropped_is_named(key):
    with pytest.raises(ValidationError, match=f"part 1 has {re.escape(repr(key))}, which is not supported"):
        message(role="user", content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b", key: None}])


def test_rendering_is_the_trainers(catalog):
    chat = [message(role="user", content="hi <|im_end|>")]
    base, model = catalog.base, catalog.resolve("base")
    plain = [Message("user", "hi <|im_end|>")]
    assert render(chat, base, model, generation_prompt=True) == render_prompt(base.tokenizer, plain)
    assert render(chat, base, model, generation_prompt=False) == render_chat(base.tokenizer, plain)


def test_a_models_own_system_prompt_stands_where_a_chat_has_none(catalog):
    model = replace(catalog.resolve("base"), system_prompt="You are Qwen.")
    user = message(role="user", content="hi")
    for chat, system in (([user], "You are Qwen."), ([message(role="system", content="Mine."), user], "Mine.")):
        expected = render_prompt(catalog.base.tokenizer, [Message("system", system), Message("user", "hi")])
        assert render(chat, catalog.base, model, generation_prompt=True) == expected


def test_a_template_that_refuses_is_a_bad_request(catalog, tiny_base):
    base = open_registry("base", tiny_base).base
    base.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRequest, match="roles must alternate") as caught:
        render([message(role="user", content="hi")], base, catalog.resolve("base"), generation_prompt=True)
    assert caught.value.param == "messages"


def test_a_message_that_calls_needs_no_content():
    expected = Message("assistant", "", (ToolCall("c1", "f", {}),))
    for content in ({"content": None}, {"content": ""}, {}):
        assert message(role="assistant", tool_calls=CALLING["tool_calls"], **content).to_message() == expected
    assert message(**RESULT).to_message() == Message("tool", "5", tool_call_id="c1")
    for fields in (
        {"role": "assistant"},
        {"role": "assistant", "tool_calls": []},
        {"role": "tool", "tool_call_id": "c1"},
    ):
        with pytest.raises(ValidationError, match="required"):
            message(**fields)
