"""The text completion on the wire: OpenAI's legacy request, response and chunk."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from serving.sampling import SHARED_HARMLESS, SamplingFields
from serving.usage import Usage
from serving.wire import Harmless, whole_text

Prompt = str | tuple[int, ...]
MAX_PROMPTS = 2048  # a body has room for a million, which would hold up every other request while they are checked
MAX_IDS = 2**18  # of all prompts together; for the same reason
_IDS_SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": MAX_IDS}
_PROMPTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}


def _prompts(value: object) -> tuple[Prompt, ...]:
    """Tells the four forms apart: a text, token ids, a list of texts, a list of token-id lists."""
    if isinstance(value, str):
        return (whole_text(value),)
    if not isinstance(value, list) or not value:
        raise ValueError("has to be a text, a list of texts, a list of token ids or a list of such lists; not empty")
    if type(value[0]) is int:
        _check_count(len(value), MAX_IDS, "token ids")
        if _are_ids(value):
            return (tuple(value),)
    _check_count(len(value), MAX_PROMPTS, "prompts")
    if all(isinstance(item, str) for item in value):
        return tuple(map(whole_text, value))
    _check_count(sum(len(item) for item in value if isinstance(item, list)), MAX_IDS, "token ids")
    if all(isinstance(item, list) and item and _are_ids(item) for item in value):
        return tuple(tuple(item) for item in value)
    raise ValueError("mixes forms: give only texts, only token ids, or only non-empty lists of token ids")


def _check_count(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"has {count} {what}; at most {most} are allowed")


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


class CompletionRequest(SamplingFields):
    harmless: ClassVar[Harmless] = {**SHARED_HARMLESS, "suffix": ("",), "add_special_tokens": (True,)}
    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompts), WithJsonSchema(_PROMPTS_SCHEMA)]
    max_tokens: int | None = Field(None, ge=0)  # OpenAI's default here is 16
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        self.check_stream_options()
        return self


class LegacyLogprobs(BaseModel):
    """One entry a token in each list; the first token of an echoed prompt has null for its numbers."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: str | None


class Completion(BaseModel):
    """A chunk has the same shape; only its last has a finish reason."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
