"""Calls are read out of a reply however it is cut; nothing that was written is lost, and no mark is shown."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.tools.call_format import CallFormat
from serving.tools.parser import CallArguments, CallBegin, CallBroken, CallParser, Content, Event

HERMES = CallFormat(
    '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", "<tool_call>", "</tool_call>", "arguments"
)
LLAMA = CallFormat('{"name": "', '", "parameters": ', "}", None, "", "", "parameters")
NAMES = frozenset({"f", "g"})
PARTS = [
    *("<tool_call>", "</tool_call>", "<tool", '{"name": "f"', '{"name": "h"', ', "arguments": ', ', "parameters": '),
    *("{}", '{"a": "}</tool_call>"}', "{", "}", '"', "\\", " ", "\n", "text", "é🦊", '"name": "g"', "[1, 2]"),
]


def written(name: str, arguments: object, form: CallFormat = HERMES) -> str:
    return form.before + name + form.between + json.dumps(arguments) + form.after


def read(
    pieces: list[str], form: CallFormat = HERMES, *, several: bool = True, truncated: bool = False
) -> tuple[CallParser, list[Event]]:
    parser = CallParser(form, NAMES, several=several)
    events = [event for piece in pieces for event in parser.push(piece)]
    return parser, [*events, *parser.end(truncated=truncated)]


def folded(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    """Returns the content, and the calls that held."""
    content, calls = "", list[tuple[str, str]]()
    for event in events:
        match event:
            case Content(text):
                content += text
            case CallBegin(name):
                calls.append((name, ""))
            case CallArguments(text):
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
            case CallBroken(text):
                calls.pop()
                content += text
    return content, calls


def test_text_and_calls_are_told_apart():
    text = "Let me see.\n" + written("f", {"a": [1, "}"]}) + "\n" + written("g", {}) + "\n"
    parser, events = read([text])
    assert folded(events) == ("Let me see.", [("f", '{"a": [1, "}"]}'), ("g", "{}")])
    assert (parser.whole, parser.broken) == (2, 0)


def test_arguments_come_as_they_are_written():
    text = written("f", {"city": "Paris"})
    parser = CallParser(HERMES, NAMES, several=True)
    events = [parser.push(character) for character in text]
    named = next(at for at, each in enumerate(events) if CallBegin("f") in each)
    assert text[: named + 1].endswith('"arguments": {')
    assert all(events[named + 1 : text.index("}") + 1])
    assert not any(isinstance(event, Content) for each in events for event in each)


def test_content_is_given_out_at_once_but_for_what_may_begin_a_call():
    parser = CallParser(HERMES, NAMES, several=True)
    assert parser.push("a <b> <to") == [Content("a <b>")]
    assert parser.push("day> ") == [Content(" <today>")]
    assert parser.end(truncated=False) == [Content(" ")]


@pytest.mark.parametrize("form", [HERMES, LLAMA])
@pytest.mark.parametrize(
    "text", ["", " \n", "plain", " two  words \n", "a <", '{"answer": {"a": 1}}', "<tool_call", "{"]
)
def test_a_reply_without_calls_is_its_text(form, text):
    assert folded(read(list(text), form)[1]) == (text, [])


def test_json_alone_is_a_call_at_the_beginning_of_a_reply_only():
    call = written("f", {"a": 1}, LLAMA)
    assert folded(read([" \n" + call + "\n"], LLAMA)[1]) == ("", [("f", '{"a": 1}')])
    assert folded(read(["so: " + call], LLAMA)[1]) == ("so: " + call, [])
    assert folded(read([f"{call}; {call}"], LLAMA, several=False)[1]) == (f"; {call}", [("f", '{"a": 1}')])


def test_keys_in_another_order_are_a_call():
    text = '<tool_call>{"arguments": {"ü": 1}, "name": "f"}</tool_call>'
    for pieces in ([text], list(text), [text.removesuffix("</tool_call>")]):
        assert folded(read(pieces)[1]) == ("", [("f", '{"ü": 1}')])


def test_a_call_is_whole_without_its_closing_mark():
    """A stop string or the limit may have cut it off."""
    for truncated in (False, True):
        for cut in ("</tool_call>", "call>", "}\n</tool_call>"):
            parser, events = read([written("f", {"a": 1}).removesuffix(cut)], truncated=truncated)
            assert folded(events) == ("", [("f", '{"a": 1}')])
            assert parser.whole == 1


@pytest.mark.parametrize(
    "text",
    [
        written("unknown", {"a": 1}),
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "x"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}, "id": 2}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1',
        "<tool_call>hello</tool_call>",
        "a </tool_call> b <tool_call>",
    ],
)
def test_a_malformed_call_is_content_as_it_was_written(text):
    for whole in (text, f"before {text} after"):
        for pieces in ([whole], list(whole)):
            parser, events = read(pieces)
            assert folded(events) == (whole, [])
            assert parser.whole == 0


def test_a_call_after_a_malformed_one_is_read():
    bad = '<tool_call>\n{"name": "f", "arguments": {"a": 1}]\n</tool_call>'
    parser, events = read([bad + written("g", {})])
    assert folded(events) == (bad, [("g", "{}")])
    assert (parser.whole, parser.broken) == (1, 1)


def test_arguments_that_a_limit_cuts_off_stay_a_call():
    text = written("f", {"city": "Paris"})
    cut = text[: text.index("ris")]
    parser, events = read([cut], truncated=True)
    assert folded(events) == ("", [("f", '{"city": "Pa')])
    assert (parser.whole, parser.broken) == (0, 0)
    assert folded(read([text[:20]], truncated=True)[1]) == (text[:20], [])


@given(st.lists(st.sampled_from(PARTS), max_size=14), st.sampled_from([HERMES, LLAMA]), st.booleans(), st.data())
@example(["<tool_call>", '{"name": "f"', ', "arguments": ', "{}", " ", "}", "</tool_call>"], HERMES, False, None)
def test_no_cut_changes_what_is_read(parts, form, several, data):
    text = "".join(parts)
    whole, events = read([text], form, several=several)
    pieces, left = list[str](), text
    while left:
        length = 1 if data is None else data.draw(st.integers(1, 9))
        pieces.append(left[:length])
        left = left[length:]
    again, others = read(pieces, form, several=several)
    assert folded(others) == folded(events)
    assert (again.whole, again.broken) == (whole.whole, whole.broken)
    content, calls = folded(events)
    assert len(calls) == whole.whole
    assert all(isinstance(json.loads(arguments), dict) and name in NAMES for name, arguments in calls)
    if not calls:
        assert content == text
