"""A malformed body is answered with the field, the value and what is allowed."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serving.chat_completions.protocol import ChatRequest
from serving.errors import BadRequest, UnknownField, UnsupportedField
from serving.validation import bad_request


def answer(**fields) -> BadRequest:
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], **fields}
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    return bad_request(caught.value.errors())


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"temperature": 3}, BadRequest, "temperature"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "cat", "content": "b"}]},
            BadRequest,
            "messages[1].role",
        ),
        ({"messages": [{"role": "user", "content": "a", "age": 3}]}, UnknownField, "messages[0].age"),
        ({"stream_options": {"include_obfuscation": True}}, UnsupportedField, "stream_options.include_obfuscation"),
        ({"functions": [{}]}, UnsupportedField, "functions"),
    ],
)
def test_the_field_is_named_as_openai_writes_it(fields, kind, param):
    error = answer(**fields)
    assert type(error) is kind
    assert error.param == param
    assert error.message.startswith(param)


def test_the_value_is_shown_but_shortened():
    assert "given was 3" in answer(temperature=3).message
    assert len(answer(temperature="x" * 10_000).message) < 200


def test_other_errors_are_counted():
    assert answer(temperature=3, n=0).message.endswith("(and 1 more)")
