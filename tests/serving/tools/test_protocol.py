"""A tool, a call or a choice that is wrong is refused by its field, its value and what to give instead."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serving.errors import BadRequest
from serving.tools.protocol import FunctionDefinition, MadeCall, Tool, ToolChoice, check_names
from tests.serving.tools.templates import CLOCK, WEATHER


def tools(*names: str) -> list[Tool]:
    return [Tool.model_validate({"type": "function", "function": {"name": name}}) for name in names]


def test_a_template_sees_the_tool_as_it_was_given_but_for_strict():
    given = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    assert Tool.model_validate(given).for_template() == WEATHER
    assert Tool.model_validate(CLOCK).for_template() == CLOCK
    assert list(Tool.model_validate(WEATHER).for_template()["function"]) == ["name", "description", "parameters"]


def test_without_parameters_there_are_no_arguments():
    schema = FunctionDefinition(name="clock").arguments_schema()
    assert schema == {"type": "object", "properties": {}, "additionalProperties": False}
    assert FunctionDefinition(name="any", parameters={}).arguments_schema() == {"type": "object"}


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"type": "array"}, "type that is not 'object'"),
        ({"type": ["object", "null"]}, "type that is not 'object'"),
        ({"properties": ["a"]}, "properties has to be"),
        ({"properties": {"a": 5}}, "properties has to be"),
        ({"required": "a"}, "required has to be"),
        ({"required": [1]}, "required has to be"),
        ({"default": float("nan")}, "JSON"),
        ({"title": "\ud800"}, "surrogate"),
    ],
)
def test_parameters_describe_an_object(parameters, reason):
    with pytest.raises(ValidationError, match=reason):
        FunctionDefinition(name="f", parameters=parameters)


@pytest.mark.parametrize("arguments", ["", "5", "[]", "{", '{"a": NaN}', '{"a": "\\ud800"}', "{'a': 1}"])
def test_arguments_of_an_earlier_call_are_the_text_of_an_object(arguments):
    with pytest.raises(ValidationError, match=r"JSON|surrogate"):
        MadeCall.model_validate({"id": "1", "function": {"name": "f", "arguments": arguments}})


def test_a_call_of_an_earlier_turn_is_read():
    call = MadeCall.model_validate(
        {"id": "1", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a": [1]}'}}
    ).to_call()
    assert (call.id, call.name, call.arguments) == ("1", "f", {"a": [1]})


@pytest.mark.parametrize(
    ("names", "choice", "param", "reason"),
    [
        (["a", "b", "a"], None, "tools[2].function.name", r"'a' is the name of tools\[0\] too"),
        ([], ToolChoice("required"), "tool_choice", "but there are no tools"),
        ([], ToolChoice("required", "a"), "tool_choice", "asks for function 'a', but there are no tools"),
        (list("abcdefg"), ToolChoice("required", "x"), "tool_choice", "'x' is not among tools; .* a, b, c, d, e and 2"),
    ],
)
def test_names_and_choice_agree(names, choice, param, reason):
    with pytest.raises(BadRequest, match=reason) as caught:
        check_names(tools(*names), choice)
    assert caught.value.param == param


def test_what_agrees_passes():
    for choice in (None, ToolChoice("none"), ToolChoice("auto")):
        check_names([], choice)
        check_names(tools("a", "b"), choice)
    check_names(tools("a", "b"), ToolChoice("required", "b"))
