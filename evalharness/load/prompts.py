"""The prompts that load users send."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from evalharness.errors import EvalError
from evalharness.load.stream import Chat

DEFAULT_PROMPTS = (
    "Explain in simple words why the sky is blue.",
    "Write a short, polite e-mail that moves a meeting from Tuesday to Thursday.",
    "List five things to check before a long bicycle tour.",
    "What is the difference between weather and climate?",
    "Write a Python function that returns the longest word of a sentence.",
    "Summarise the plot of a story about a lighthouse keeper who finds a message in a bottle.",
    "Give me three ideas for a quick dinner with rice, eggs and spinach.",
    "How does a bicycle stay upright? Answer step by step.",
    "Rewrite this more friendly: 'Your request was denied because the form is incomplete.'",
    "A train goes 84 km in 70 minutes. How fast is it in km/h? Show the steps.",
)


class PromptsRefused(EvalError):
    """A prompt file that cannot be used."""


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")

    messages: list[_Message]


def load_prompts(path: Path | None) -> tuple[Chat, ...]:
    """Reads one prompt a line, or from .jsonl one {"messages": [...]} a line; without a path the built-in ones."""
    if path is None:
        return tuple(_user(prompt) for prompt in DEFAULT_PROMPTS)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsRefused(f"--prompts {path}: cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise PromptsRefused(f"--prompts {path}: has no prompt; write one a line")
    if path.suffix != ".jsonl":
        return tuple(_user(line) for _, line in numbered)
    return tuple(_parse(path, number, line) for number, line in numbered)


def _user(prompt: str) -> Chat:
    return ({"role": "user", "content": prompt},)


def _parse(path: Path, number: int, line: str) -> Chat:
    try:
        row = _Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "line"
        raise PromptsRefused(f"--prompts {path}:{number}: {where}: {first['msg']}") from None
    return tuple(message.model_dump() for message in row.messages)
