"""The text of a call: whether what has come so far is its head or its tail, or may still become one."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

WHITE = " \t\r\n"
_NAME = re.compile(r'"([a-zA-Z0-9_-]{1,64})"')
_PART_OF_NAME = re.compile(r'"[a-zA-Z0-9_-]{0,64}')


class Reading(enum.Enum):
    OPEN = "open"  # the text ends too early to tell
    OTHER = "other"


def follow(text: str, parts: Sequence[str], start: int = 0) -> int | Reading:
    """Returns where `parts` end in `text`; white space may stand before each."""
    at = start
    for part in parts:
        at = _after_white(text, at)
        if not text.startswith(part, at):
            return Reading.OPEN if part.startswith(text[at:]) else Reading.OTHER
        at += len(part)
    return at


def read_head(text: str, arguments_key: str) -> tuple[str, int] | Reading:
    """Returns a call's name and where the brace of its arguments stands."""
    at = follow(text, ("{", '"name"', ":"))
    if isinstance(at, Reading):
        return at
    at = _after_white(text, at)
    name = _NAME.match(text, at)
    if name is None:
        return Reading.OPEN if at == len(text) or _PART_OF_NAME.fullmatch(text, at) else Reading.OTHER
    end = follow(text, (",", f'"{arguments_key}"', ":", "{"), name.end())
    return end if isinstance(end, Reading) else (name[1], end - 1)


def begun(text: str, mark: str) -> int:
    """Returns how many of the last characters of `text` may be the beginning of `mark`."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((length for length in lengths if mark.startswith(text[-length:])), 0)


def _after_white(text: str, at: int) -> int:
    while at < len(text) and text[at] in WHITE:
        at += 1
    return at
