"""An offer holds a reply only where it has to, and allows several calls only where the template can write them."""

from __future__ import annotations

import pytest

from serving.registry.boot import open_registry
from serving.tools.offer import Offer, is_held, make_offer
from serving.tools.protocol import Tool, ToolChoice
from tests.serving.tools import templates


@pytest.fixture(scope="module")
def registry(tiny_base):
    return open_registry("base", tiny_base)


def offer(registry, choice="auto", name=None, *, template=templates.HERMES, parallel=True, strict=False) -> Offer:
    registry.base.tokenizer.chat_template = template
    given = [{**WEATHER, "function": {**WEATHER["function"], "strict": strict}} for WEATHER in (templates.WEATHER,)]
    tools = [Tool.model_validate(tool) for tool in (*given, templates.CLOCK)]
    return make_offer(tools, ToolChoice(choice, name), registry.base, registry.resolve("base"), parallel=parallel)


def test_a_free_choice_has_no_grammar_and_a_forced_one_has(registry):
    assert offer(registry).grammar() is None
    required = offer(registry, "required").grammar()
    assert "get_weather" in required.text
    assert "clock" in required.text
    named = offer(registry, "required", "clock").grammar()
    assert "get_weather" not in named.text
    assert offer(registry, strict=True).grammar().text.count("lead") > 1
    assert is_held(offer(registry, strict=True).tools, ToolChoice("auto"))


def test_a_named_function_is_called_once(registry):
    assert not offer(registry, "required", "clock").several
    assert offer(registry, "required").several


def test_one_call_is_all_where_it_is_asked_for_or_the_template_has_no_more(registry):
    assert offer(registry).stop == ()
    alone = offer(registry, parallel=False)
    assert (alone.several, alone.stop) == (False, ("</tool_call>",))
    assert offer(registry, "required", parallel=False).stop == ()
    llama = offer(registry, template=templates.LLAMA)
    assert (llama.several, llama.stop) == (False, ())


def test_the_parser_knows_the_tools(registry):
    parser = offer(registry).parser()
    parser.push('<tool_call>{"name": "clock", "arguments": {}}</tool_call><tool_call>{"name": "x", "arguments": {}}')
    parser.end(truncated=False)
    assert parser.whole == 1
