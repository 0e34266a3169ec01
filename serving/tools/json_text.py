"""The JSON text: how far an object in it reaches, read piece by piece, and what no JSON text can carry."""

from __future__ import annotations

import json
from typing import Any

from serving.wire import whole_text

MAX_DEPTH = 64  # of a schema or of arguments: what reads them later recurses


def checked_json(value: Any) -> None:
    """Raises ValueError for a value nested too deep, a number that JSON has not, and half a surrogate pair."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested deeper than {MAX_DEPTH}; simplify it")
        level = [child for each in level for child in _children(each)]
    whole_text(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def read_object(text: str) -> dict[str, Any] | None:
    """Returns the JSON object that `text` is, None where it is none."""
    try:
        value = json.loads(text)
        checked_json(value)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class ObjectScanner:
    """Finds the end of one JSON object, given piece by piece from its brace on; whether it is JSON is not its task."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def end_in(self, piece: str) -> int | None:
        """Returns where in `piece` the object has ended, in characters, None where it goes on."""
        for at, character in enumerate(piece):
            if self._quoted:
                self._in_text(character)
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None

    def _in_text(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._quoted = False
