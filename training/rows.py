"""A row of a data set, checked: Alpaca, ShareGPT or OpenAI messages -> Conversation, or the reason it is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.chat import Message, Role
from training.errors import TrainingError

# Keys that change what a row means and cannot be trained here; a row that fills one is refused, never half-read.
_UNSUPPORTED_ROW = ("tools", "functions", "images", "videos", "audios")
_UNSUPPORTED_TURN = ("tool_calls", "function_call", "tool_call_id")


class DataError(TrainingError):
    """A data set that cannot be read or must not be trained on; names the file, the rows and the remedy."""


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row. `number` counts from 1; `line` is where it begins in a text file, None in others."""

    number: int
    line: int | None
    value: object


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Why a row is left out: the field, such as `conversations[2].value`, and the reason."""

    number: int
    line: int | None
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{_where(self.number, self.line)}: {self.field}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A valid chat: an optional system message, then user and assistant in turn; the last is the assistant's."""

    number: int
    line: int | None
    messages: tuple[Message, ...]

    @property
    def where(self) -> str:
        return _where(self.number, self.line)

    @property
    def prompt_text(self) -> str:
        """What the user says, all turns."""
        return "\n".join(message.content for message in self.messages if message.role == "user")

    @property
    def reply_text(self) -> str:
        return "\n".join(message.content for message in self.messages if message.role == "assistant")


@dataclass(frozen=True, slots=True)
class AlpacaLayout:
    """The column of each part; None where the data set has none."""

    prompt: str = "instruction"
    query: str | None = "input"
    response: str = "output"
    system: str | None = "system"
    history: str | None = "history"


@dataclass(frozen=True, slots=True)
class ChatLayout:
    """Where turns stand: in the first of `columns` a row has; a turn is of the first form whose role key it has."""

    columns: tuple[str, ...] = ("conversations", "messages")
    forms: tuple[tuple[str, str], ...] = (("from", "value"), ("role", "content"))  # role key, content key
    roles: Mapping[str, Role] = field(
        default_factory=lambda: {
            "human": "user",
            "user": "user",
            "gpt": "assistant",
            "assistant": "assistant",
            "system": "system",
        }
    )
    system: str | None = "system"  # a column beside the turns


ALPACA = AlpacaLayout()
SHAREGPT = ChatLayout()
OPENAI = ChatLayout(
    columns=("messages",),
    forms=(("role", "content"),),
    roles={"system": "system", "user": "user", "assistant": "assistant"},
    system=None,
)
Layout = AlpacaLayout | ChatLayout


class _Fault(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field, self.reason = field, reason


def detect_layout(row: object) -> Layout | None:
    """Returns the layout whose keys the row has, or None."""
    if not isinstance(row, Mapping):
        return None
    if "conversations" in row:
        return SHAREGPT
    if "messages" in row:
        return OPENAI
    return ALPACA if {"instruction", "output"} & set(row) else None


def to_conversation(row: Row, layout: Layout) -> Conversation | RowProblem:
    """Returns the row's chat, its texts exactly as they are, or the first problem found.

    An Alpaca user text is the instruction, then a newline and the input where that is not empty.
    """
    try:
        if not isinstance(row.value, Mapping):
            raise _Fault("row", f"is {_kind(row.value)}, not an object")
        for key in _UNSUPPORTED_ROW:
            if row.value.get(key):
                raise _Fault(key, "tools, images, video and audio are not supported")
        read = _alpaca(row.value, layout) if isinstance(layout, AlpacaLayout) else _chat(row.value, layout)
        return Conversation(row.number, row.line, tuple(read))
    except _Fault as fault:
        return RowProblem(row.number, row.line, fault.field, fault.reason)


def _alpaca(row: Mapping[str, Any], layout: AlpacaLayout) -> list[Message]:
    messages = _system(row, layout.system) + _history(row, layout.history)
    prompt = _text(row, layout.prompt)
    query = _optional_text(row, layout.query)
    messages.append(Message("user", f"{prompt}\n{query}" if query else prompt))
    messages.append(Message("assistant", _text(row, layout.response)))
    return messages


def _history(row: Mapping[str, Any], column: str | None) -> list[Message]:
    pairs = row.get(column) if column else None
    if pairs is None:
        return []
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise _Fault(str(column), f"is {_kind(pairs)}, not a list of [prompt, reply] pairs")
    messages = []
    for index, pair in enumerate(pairs):
        where = f"{column}[{index}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise _Fault(where, "is not a [prompt, reply] pair")
        messages.append(Message("user", _checked(pair[0], f"{where}[0]")))
        messages.append(Message("assistant", _checked(pair[1], f"{where}[1]")))
    return messages


def _chat(row: Mapping[str, Any], layout: ChatLayout) -> list[Message]:
    column = next((name for name in layout.columns if name in row), None)
    if column is None:
        raise _Fault(layout.columns[0], "is missing")
    turns = row[column]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise _Fault(column, f"is {_kind(turns)}, not a list of turns")
    messages = [_turn(turn, f"{column}[{index}]", layout) for index, turn in enumerate(turns)]
    system = _system(row, layout.system)
    if system and messages and messages[0].role == "system":
        raise _Fault(str(layout.system), f"and {column}[0] are both a system message")
    _check_order(messages, column)
    return system + messages


def _turn(turn: Any, where: str, layout: ChatLayout) -> Message:
    if not isinstance(turn, Mapping):
        raise _Fault(where, f"is {_kind(turn)}, not an object")
    form = next((form for form in layout.forms if form[0] in turn), None)
    if form is None:
        raise _Fault(where, f"has no {' or '.join(repr(form[0]) for form in layout.forms)}")
    for key in _UNSUPPORTED_TURN:
        if turn.get(key):
            raise _Fault(f"{where}.{key}", "tool calls are not supported")
    if turn.get("weight") not in (None, 1):  # Parquet and the hub fill in None
        raise _Fault(f"{where}.weight", f"is {turn['weight']!r}; only 1 is supported: every reply is trained")
    name = turn[form[0]]
    role = layout.roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise _Fault(f"{where}.{form[0]}", f"is {name!r}; known: {', '.join(layout.roles)}")
    if form[1] not in turn:
        raise _Fault(f"{where}.{form[1]}", "is missing")
    return Message(role, _checked(turn[form[1]], f"{where}.{form[1]}", may_be_empty=role == "system"))


def _check_order(messages: Sequence[Message], column: str) -> None:
    if not messages:
        raise _Fault(column, "is empty")
    start = 1 if messages[0].role == "system" else 0
    for index, message in enumerate(messages[start:], start):
        expected = "user" if (index - start) % 2 == 0 else "assistant"
        if message.role == "system":
            raise _Fault(f"{column}[{index}]", "is a system message after the first turn")
        if message.role != expected:
            before = "first" if index == start else f"after another {message.role} turn"
            raise _Fault(f"{column}[{index}]", f"is the {message.role}'s turn, {before}; expected the {expected}'s")
    if messages[-1].role != "assistant":
        raise _Fault(column, f"ends with the {messages[-1].role}'s turn: there is no reply to train on")


def _system(row: Mapping[str, Any], column: str | None) -> list[Message]:
    text = _optional_text(row, column)
    return [Message("system", text)] if text else []


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise _Fault(column, "is missing")
    return _checked(row[column], column)


def _optional_text(row: Mapping[str, Any], column: str | None) -> str:
    if column is None or row.get(column) is None:
        return ""
    return _checked(row[column], column, may_be_empty=True)


def _checked(value: Any, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _Fault(where, f"is {_kind(value)}, not text")
    if not may_be_empty and not value.strip():
        raise _Fault(where, "is empty" if not value else "is only white space")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _Fault(where, "has half a surrogate pair, which is no character")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _where(number: int, line: int | None) -> str:
    return f"row {number}" if line is None else f"row {number} (line {line})"
