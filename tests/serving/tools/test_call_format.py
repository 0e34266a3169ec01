"""How calls are written is learnt from the template; one that renders no tools, or in an unknown way, is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serving.errors import UnsupportedField
from serving.registry.boot import open_registry
from serving.tools.call_format import CallFormat, call_format
from tests.serving.tools import templates
from tests.serving.tools.templates import HERMES_CALL as CALL
from tests.tiny import TEMPLATE, make_tokenizer


@pytest.fixture(scope="module")
def registry(tiny_base):
    return open_registry("base", tiny_base)


def form_of(registry, template, system=None) -> CallFormat:
    registry.base.tokenizer.chat_template = template
    return call_format(registry.base, replace(registry.resolve("base"), system_prompt=system), "tools")


def test_marks_around_json_are_found(registry):
    assert form_of(registry, templates.HERMES) == CallFormat(
        before='<tool_call>\n{"name": "',
        between='", "arguments": ',
        after="}\n</tool_call>",
        gap="\n",
        opening="<tool_call>",
        closing="</tool_call>",
        arguments_key="arguments",
    )


def test_marks_that_are_tokens_are_found_with_their_ids(registry):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<other>"])
    tokenizer.chat_template = templates.HERMES
    form = call_format(replace(registry.base, tokenizer=tokenizer), registry.resolve("base"), "tools")
    assert form.mark_ids == {"<tool_call>": 400, "</tool_call>": 401}


def test_json_alone_is_found_and_that_one_call_is_all(registry):
    form = form_of(registry, templates.LLAMA)
    assert (form.opening, form.closing, form.arguments_key, form.gap) == ("", "", "parameters", None)
    assert form.before + "f" + form.between + "{}" + form.after == '{"name": "f", "parameters": {}}'


def test_a_template_that_writes_calls_one_after_another_has_an_empty_gap(registry):
    template = templates.HERMES.replace("{{ '\\n' }}{% endif %}{% endfor %}", "{% endif %}{% endfor %}")
    assert template != templates.HERMES
    assert form_of(registry, template).gap == ""


def test_a_thought_before_a_call_is_no_part_of_it(registry):
    thinking = templates.HERMES.replace("{{ '<tool_call>\\n' }}", "{{ '<think>\\n\\n</think>\\n<tool_call>\\n' }}")
    assert thinking != templates.HERMES
    assert form_of(registry, thinking) == replace(form_of(registry, templates.HERMES), gap=None)
    once = templates.chatml(CALL, before="{{ '<think>\\n\\n</think>\\n\\n' }}")
    assert form_of(registry, once) == form_of(registry, templates.HERMES)


def test_a_system_prompt_of_the_models_own_changes_nothing(registry):
    assert form_of(registry, templates.HERMES, "You are Qwen.") == form_of(registry, templates.HERMES)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TEMPLATE, "renders no tools"),
        (templates.MUTE, "renders no tools"),
        (templates.XML, r"writes a call as '<tool_call><function=graft_probe>.*; a call is known as"),
        (templates.MARKED, "writes a call behind a control token, which no reply shows; a call is known as"),
        ("{% if messages[1] %}!{% endif %}" + templates.HERMES, "rewrites the prompt once a call follows"),
        (templates.DEAF, "renders no result of a call"),
        (templates.HERMES.replace("\\n</tool_call>", ""), "; a call is known as"),
        (templates.HERMES + "{% if tools %}{{ raise_exception('no tools, please') }}{% endif %}", "no tools, please"),
    ],
)
def test_what_cannot_be_read_back_is_refused_by_the_models_name(registry, template, reason):
    with pytest.raises(UnsupportedField, match=f"^tools: model 'base' cannot call functions: .*{reason}") as caught:
        form_of(registry, template)
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_field")
