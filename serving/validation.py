"""The validation answer: what a malformed body is told, one 400 naming the field, the value and what is allowed."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import BadRequest, UnknownField, UnsupportedField

_ERRORS: Mapping[str, type[BadRequest]] = {"unknown_field": UnknownField, "unsupported_field": UnsupportedField}
MAX_VALUE_CHARACTERS = 60


def bad_request(errors: Sequence[Mapping[str, Any]]) -> BadRequest:
    """Turns pydantic's errors into the one of the first field; the message counts the others."""
    first = errors[0]
    param = param_of(first)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _ERRORS.get(first["type"], BadRequest)(_sentence(first, param) + more, param=param, code=_code(first))


def param_of(error: Mapping[str, Any]) -> str | None:
    """Writes pydantic's location as OpenAI does: messages[0].content."""
    location = [*error["loc"], *([error["ctx"]["field"]] if "field" in error.get("ctx", {}) else [])]
    if location[:1] == ["body"]:
        location = location[1:]
    if error["type"] == "json_invalid":
        return None
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    return path or None


def _code(error: Mapping[str, Any]) -> str | None:
    return {"json_invalid": "invalid_json", "missing": "missing_field"}.get(error["type"])


def _shortened(value: object) -> str:
    text = reprlib.repr(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 3] + "..."


def _sentence(error: Mapping[str, Any], param: str | None) -> str:
    kind = error["type"]
    if kind == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    if param is None and kind == "missing":
        return "the body is empty; send a JSON object"
    if param is None:
        what = type(error["input"]).__name__
        hint = " with Content-Type: application/json" if isinstance(error["input"], bytes) else ""
        return f"the body is {what}, not an object; send a JSON object{hint}"
    if kind == "missing":
        return f"{param} is required"
    if kind in _ERRORS:
        return f"{param} {error['msg']}"
    reason = str(error["msg"]).removeprefix("Value error, ")
    return f"{param}: {reason}; given was {_shortened(error['input'])}"
