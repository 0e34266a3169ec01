"""Words for a settings field: what it accepts, read from its own constraints, and the nearest known name."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

UNSET = "none"  # TOML has no null: `--data.limit none` unsets a field that may be unset
_KINDS = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "pattern": "matching", "min_length": "of length >="}


def allowed(field: FieldInfo) -> str:
    """Returns what a field accepts, such as `a whole number, >= 1, <= 1024 (of the update)`."""
    kinds = [_kind(option) for option in options(field.annotation)]
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in _SIGNS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([" or ".join(kinds), *bounds]) + f" ({field.description})"


def options(annotation: Any) -> list[Any]:
    """Returns the flat alternatives of an annotation: types, and the strings of a Literal."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return options(typing.get_args(annotation)[0])
    if origin is Literal:
        return list(typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(annotation) for option in options(part)]
    return [origin or annotation]


def wants_text(field: FieldInfo) -> bool:
    """Returns whether only text (or a path) is accepted, so that `7` means "7"."""
    return all(option in (str, Path, type(None)) or isinstance(option, str) for option in options(field.annotation))


def suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns the end of an error about an unknown name: the nearest known one, else all of them."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(prefix + name for name in names)}"


def _kind(option: Any) -> str:
    if option is type(None):
        return UNSET
    return repr(option) if isinstance(option, str) else _KINDS.get(option, "a list of text")
