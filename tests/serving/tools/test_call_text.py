"""What has come of a call is told from what may still become one and from what is none."""

from __future__ import annotations

import pytest

from serving.tools.call_text import Reading, begun, follow, read_head

HEAD = '\n { "name" : "get-it_1" , "arguments" :\t{'


def test_a_head_is_open_until_its_brace_stands():
    assert all(read_head(HEAD[:length], "arguments") is Reading.OPEN for length in range(len(HEAD)))
    assert read_head(HEAD + '"a": 1', "arguments") == ("get-it_1", len(HEAD) - 1)


@pytest.mark.parametrize(
    "text",
    [
        *("x", "{}", '{"names"', '{"name": 5', '{"name": "a b"', '{"name": ""', '{"name": "a"}', '{"name": "a", "x"'),
        *('{"name": "a", "arguments": [', '{"arguments"', f'{{"name": "{"a" * 65}'),
    ],
)
def test_another_text_is_told_at_once(text):
    assert read_head(text, "arguments") is Reading.OTHER


def test_parts_follow_each_other_over_white_space():
    assert follow("} \n</t>x", ("}", "</t>")) == 7
    assert follow("}", ("}", "</t>")) is Reading.OPEN
    assert follow("} </tx", ("}", "</t>")) is Reading.OTHER


@pytest.mark.parametrize(("text", "count"), [("", 0), ("a", 0), ("a<", 1), ("<<to", 3), ("<tool>", 0), ("<tool> <", 1)])
def test_the_longest_beginning_of_a_mark_is_held(text, count):
    assert begun(text, "<tool>") == count
