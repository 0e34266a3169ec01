"""No field of a body is ignored: it is typed, harmless, or refused by name."""

from __future__ import annotations

from typing import ClassVar

import jsonschema_rs
import pytest
from pydantic import Field, ValidationError

from serving.wire import Wire


class Body(Wire):
    harmless: ClassVar = {"user": None, "store": (False,), "top_k": (0, -1), "audio": ()}
    remedies: ClassVar = {"audio": "write text"}
    text: str
    count: int = 3
    source: str | None = Field(None, alias="from")


def first_error(**data):
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(data)
    return caught.value.errors()[0]


@pytest.mark.parametrize(
    "extra", [{"user": {"any": 1}}, {"store": False}, {"top_k": -1}, {"audio": None}, {"count": None}]
)
def test_harmless_and_null_fields_are_accepted(extra):
    assert Body.model_validate({"text": "a", **extra}) == Body(text="a")


@pytest.mark.parametrize("extra", [{"store": True}, {"store": 0}, {"top_k": 5}, {"top_k": False}, {"audio": {}}])
def test_a_value_that_would_change_the_output_is_refused(extra):
    error = first_error(text="a", **extra)
    assert error["type"] == "unsupported_field"
    assert error["ctx"]["field"] == next(iter(extra))


def test_an_unknown_field_gets_a_suggestion():
    assert "did you mean count?" in first_error(text="a", cuont=1)["msg"]
    assert "remove it" in first_error(text="a", zzz=1)["msg"]


def test_of_a_giant_unknown_name_only_the_beginning_is_compared_and_repeated():
    error = first_error(text="a", **{"x" * 4_000_000: 1})
    assert (error["type"], error["ctx"]["field"]) == ("unknown_field", "x" * 100)


@pytest.mark.parametrize(
    "data", [{"text": None}, {}, {"text": 1}, {"text": "a", "count": "3"}, {"text": "a", "count": True}]
)
def test_types_are_strict(data):
    assert first_error(**data)["type"] in {"string_type", "missing", "int_type"}


def test_a_refusal_gives_the_fields_own_remedy_where_it_has_one():
    assert "would change the output; write text" in first_error(text="a", audio={})["msg"]
    assert "remove it or give False" in first_error(text="a", store=True)["msg"]


def test_a_field_with_another_name_on_the_wire_is_known_by_that():
    assert Body.model_validate({"text": "a", "from": "b"}).source == "b"
    assert Body.model_validate({"text": "a", "from": None}).source is None
    assert first_error(text="a", source="b")["type"] == "unknown_field"


@pytest.mark.parametrize(
    "body",
    [
        {"text": "a", "count": None, "user": {"any": 1}, "store": False, "top_k": -1, "audio": None, "from": None},
        {"text": "a", "store": True},
        {"text": "a", "top_k": 5},
        {"text": "a", "audio": {}},
        {"text": "a", "zzz": 1},
        {"text": "a", "source": "b"},
        {"text": "a", "count": "3"},
        {"text": None},
        {},
    ],
)
def test_the_json_schema_accepts_what_the_model_accepts(body):
    try:
        accepted = bool(Body.model_validate(body))
    except ValidationError:
        accepted = False
    assert jsonschema_rs.is_valid(Body.model_json_schema(), body) == accepted
