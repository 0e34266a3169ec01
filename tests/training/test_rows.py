"""Properties of row checking: every format gives the same chat, texts stay as they are, each fault has its name."""

from __future__ import annotations

from typing import Any

import pytest

from training.chat import Message
from training.rows import (
    ALPACA,
    OPENAI,
    SHAREGPT,
    AlpacaLayout,
    ChatLayout,
    Conversation,
    Layout,
    Row,
    RowProblem,
    detect_layout,
    to_conversation,
)

CHAT = (Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "fox"))
LONGER = (*CHAT, Message("user", "and?"), Message("assistant", "dog"))


def turns(*pairs: str, role: str = "from", content: str = "value") -> list[dict[str, str]]:
    return [dict(zip((role, content), pair.split(":", 1), strict=True)) for pair in pairs]


def read(value: object, layout: Layout) -> Conversation | RowProblem:
    return to_conversation(Row(7, 9, value), layout)


@pytest.mark.parametrize(
    ("value", "layout"),
    [
        (
            {"instruction": "and?", "input": "", "output": "dog", "system": "Be brief.", "history": [["hi", "fox"]]},
            ALPACA,
        ),
        ({"conversations": turns("system:Be brief.", "human:hi", "gpt:fox", "human:and?", "gpt:dog")}, SHAREGPT),
        ({"system": "Be brief.", "conversations": turns("human:hi", "gpt:fox", "human:and?", "gpt:dog")}, SHAREGPT),
        (
            {
                "conversations": turns(
                    "system:Be brief.",
                    "user:hi",
                    "assistant:fox",
                    "user:and?",
                    "assistant:dog",
                    role="role",
                    content="content",
                )
            },
            SHAREGPT,
        ),
        (
            {
                "id": 3,
                "messages": turns(
                    "system:Be brief.",
                    "user:hi",
                    "assistant:fox",
                    "user:and?",
                    "assistant:dog",
                    role="role",
                    content="content",
                ),
            },
            OPENAI,
        ),
    ],
)
def test_every_format_gives_the_same_chat(value: dict[str, Any], layout: Layout):
    chat = read(value, layout)
    assert isinstance(chat, Conversation), chat
    assert chat.messages == LONGER
    assert (chat.prompt_text, chat.reply_text, chat.where) == ("hi\nand?", "fox\ndog", "row 7 (line 9)")


@pytest.mark.parametrize(
    ("row", "user"),
    [
        ({"instruction": " Sum it.\n", "input": "", "output": "x"}, " Sum it.\n"),
        ({"instruction": "Sum it.", "input": " \n1 2", "output": "x"}, "Sum it.\n \n1 2"),
        ({"instruction": "Sum it.", "input": " ", "output": "x"}, "Sum it.\n "),
        ({"instruction": "Sum it.", "input": None, "output": "x", "history": None, "system": ""}, "Sum it."),
        ({"instruction": "Sum it.", "output": "x", "history": []}, "Sum it."),
    ],
)
def test_an_alpaca_user_text_is_instruction_newline_input(row: dict[str, Any], user: str):
    chat = read(row, ALPACA)
    assert isinstance(chat, Conversation), chat
    assert chat.messages == (Message("user", user), Message("assistant", "x"))


def test_texts_are_never_stripped():
    chat = read({"messages": turns("user:\n hi ", "assistant: fox\n\n", role="role", content="content")}, OPENAI)
    assert isinstance(chat, Conversation)
    assert [message.content for message in chat.messages] == ["\n hi ", " fox\n\n"]


def test_an_empty_system_turn_stays_since_it_silences_the_templates_default():
    chat = read({"conversations": turns("system:", "human:hi", "gpt:fox")}, SHAREGPT)
    assert isinstance(chat, Conversation)
    assert chat.messages[0] == Message("system", "")


def alpaca(**changes: Any) -> dict[str, Any]:
    row = {"instruction": "Say hi.", "input": "", "output": "hi"} | changes
    return {key: value for key, value in row.items() if value is not ...}


BAD: list[tuple[str, object, Layout, str, str]] = [
    ("list for an object", [1, 2], ALPACA, "row", "a list"),
    ("text for an object", "hello", OPENAI, "row", "text"),
    ("null for an object", None, SHAREGPT, "row", "null"),
    ("instruction missing", alpaca(instruction=...), ALPACA, "instruction", "missing"),
    ("instruction empty", alpaca(instruction=""), ALPACA, "instruction", "empty"),
    ("instruction blank", alpaca(instruction=" \n"), ALPACA, "instruction", "white space"),
    ("instruction null", alpaca(instruction=None), ALPACA, "instruction", "null"),
    ("instruction a number", alpaca(instruction=3), ALPACA, "instruction", "a number"),
    ("input a list", alpaca(input=["x"]), ALPACA, "input", "a list"),
    ("output missing", alpaca(output=...), ALPACA, "output", "missing"),
    ("output empty", alpaca(output=""), ALPACA, "output", "empty"),
    ("output null", alpaca(output=None), ALPACA, "output", "null"),
    ("output an object", alpaca(output={"text": "x"}), ALPACA, "output", "an object"),
    ("output true", alpaca(output=True), ALPACA, "output", "true or false"),
    ("half a character", alpaca(output="x\ud83d"), ALPACA, "output", "surrogate"),
    ("system a number", alpaca(system=1), ALPACA, "system", "a number"),
    ("history text", alpaca(history="hi"), ALPACA, "history", "text"),
    ("history of triples", alpaca(history=[["a", "b", "c"]]), ALPACA, "history[0]", "pair"),
    ("history with an empty reply", alpaca(history=[["a", "b"], ["c", ""]]), ALPACA, "history[1][1]", "empty"),
    ("an image", alpaca(images=["x.png"]), ALPACA, "images", "not supported"),
    ("turns missing", {"id": 1}, SHAREGPT, "conversations", "missing"),
    ("turns text", {"conversations": "hi"}, SHAREGPT, "conversations", "text"),
    ("turns null", {"messages": None}, OPENAI, "messages", "null"),
    ("no turns", {"conversations": []}, SHAREGPT, "conversations", "empty"),
    ("a turn that is text", {"conversations": ["hi"]}, SHAREGPT, "conversations[0]", "text"),
    ("a turn without from", {"conversations": [{"value": "hi"}]}, SHAREGPT, "conversations[0]", "'from'"),
    ("a turn without value", {"conversations": [{"from": "human"}]}, SHAREGPT, "conversations[0].value", "missing"),
    ("an unknown from", {"conversations": turns("alien:hi")}, SHAREGPT, "conversations[0].from", "'alien'"),
    (
        "a from that is a list",
        {"conversations": [{"from": [], "value": "x"}]},
        SHAREGPT,
        "conversations[0].from",
        "known",
    ),
    (
        "two users",
        {"conversations": turns("human:a", "human:b", "gpt:c")},
        SHAREGPT,
        "conversations[1]",
        "another user",
    ),
    ("two assistants", {"conversations": turns("human:a", "gpt:b", "gpt:c")}, SHAREGPT, "conversations[2]", "another"),
    ("assistant first", {"conversations": turns("gpt:b", "human:a", "gpt:c")}, SHAREGPT, "conversations[0]", "first"),
    (
        "system in the middle",
        {"conversations": turns("human:a", "system:s", "gpt:b")},
        SHAREGPT,
        "conversations[1]",
        "system",
    ),
    (
        "two systems",
        {"conversations": turns("system:a", "system:s", "human:a", "gpt:b")},
        SHAREGPT,
        "conversations[1]",
        "system",
    ),
    (
        "a system beside a system",
        {"system": "s", "conversations": turns("system:a", "human:a", "gpt:b")},
        SHAREGPT,
        "system",
        "both",
    ),
    ("no assistant", {"conversations": turns("human:a")}, SHAREGPT, "conversations", "no reply"),
    ("system alone", {"conversations": turns("system:a")}, SHAREGPT, "conversations", "no reply"),
    ("user last", {"conversations": turns("human:a", "gpt:b", "human:c")}, SHAREGPT, "conversations", "no reply"),
    ("an empty reply", {"conversations": turns("human:a", "gpt:")}, SHAREGPT, "conversations[1].value", "empty"),
    (
        "a null reply",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        OPENAI,
        "messages[1].content",
        "null",
    ),
    (
        "content in parts",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        OPENAI,
        "messages[0].content",
        "a list",
    ),
    (
        "a tool's turn",
        {"messages": turns("user:a", "tool:b", role="role", content="content")},
        OPENAI,
        "messages[1].role",
        "'tool'",
    ),
    (
        "a tool call",
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "tool_calls": [{"id": "1"}]},
            ]
        },
        OPENAI,
        "messages[1].tool_calls",
        "not supported",
    ),
    (
        "a reply that must not be trained",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        OPENAI,
        "messages[1].weight",
        "0",
    ),
    ("tools beside the turns", {"tools": [{"type": "function"}], "messages": []}, OPENAI, "tools", "not supported"),
    ("ShareGPT's keys in OpenAI's format", {"messages": turns("human:a")}, OPENAI, "messages[0]", "'role'"),
]


def test_the_sweep_has_many_kinds_of_bad_rows():
    assert len({kind for kind, *_ in BAD}) >= 40


@pytest.mark.parametrize(("value", "layout", "field", "reason"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_a_bad_row_is_named_by_line_field_and_reason(value: object, layout: Layout, field: str, reason: str):
    problem = read(value, layout)
    assert isinstance(problem, RowProblem), problem
    assert (problem.number, problem.line, problem.field) == (7, 9, field)
    assert reason in problem.reason
    assert str(problem) == f"row 7 (line 9): {field}: {problem.reason}"


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"conversations": []}, SHAREGPT),
        ({"messages": [], "output": ""}, OPENAI),
        ({"instruction": ""}, ALPACA),
        ({"output": ""}, ALPACA),
        ({"text": ""}, None),
        (["instruction"], None),
    ],
)
def test_the_layout_is_told_by_the_keys(row: object, layout: Layout | None):
    assert detect_layout(row) is layout


def test_a_layout_renames_columns_and_tags():
    row = {"q": "hi", "context": "c", "a": "fox", "instruction": "no", "input": "no"}
    chat = read(row, AlpacaLayout(prompt="q", query=None, response="a", system=None, history=None))
    assert isinstance(chat, Conversation)
    assert chat.messages == CHAT[1:]
    layout = ChatLayout(("talk",), (("who", "what"),), {"U": "user", "A": "assistant"}, "sys")
    chat = read({"talk": turns("U:hi", "A:fox", role="who", content="what"), "sys": "Be brief."}, layout)
    assert isinstance(chat, Conversation)
    assert chat.messages == CHAT
