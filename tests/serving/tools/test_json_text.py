"""An object's end is found however its text is cut, and what JSON text cannot carry is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.tools.json_text import MAX_DEPTH, ObjectScanner, checked_json, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\{}[]é🦊\n'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='k"\\{}'), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(alphabet='k"\\{}'), VALUES, max_size=3), st.text(alphabet='} ]"x'), st.data())
def test_the_end_is_found_wherever_the_text_is_cut(value, rest, data):
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 1])))
    scanner, read, left = ObjectScanner(), "", text + rest
    while True:
        piece = left[: data.draw(st.integers(1, 5))]
        left = left[len(piece) :]
        end = scanner.end_in(piece)
        read += piece if end is None else piece[:end]
        if end is not None:
            break
    assert read == text
    assert read_object(read) == value


@pytest.mark.parametrize("text", ["", "{", "[1]", "1", '{"a": NaN}', '{"a": "\\ud800"}', "{'a': 1}", '{"a": 1} x'])
def test_what_is_no_object_is_none(text):
    assert read_object(text) is None


def test_what_json_cannot_carry_is_refused():
    deep: dict = {}
    for _ in range(MAX_DEPTH):
        deep = {"a": [deep]}
    for value, reason in ((deep, "nested deeper"), ({"a": float("inf")}, "JSON"), ({"\udc00": 1}, "surrogate")):
        with pytest.raises(ValueError, match=reason):
            checked_json(value)
    checked_json({"a": [1, {"b": None}]})
