"""The chat message: as OpenAI writes it, and as the template takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, WithJsonSchema

from serving.errors import BadRequest
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel
from serving.wire import Harmless, Text, Wire, unsupported
from training.chat import Message, TemplateError, render_chat, render_prompt, with_default_system

MAX_MESSAGES = 512  # of a chat: the time to render one grows with the square of its replies
_PART_KEYS = {"type", "text"}
# Where a template puts tools, and how a model writes a call, differ from family to family.
NO_TOOLS = (
    "no chat template that is proven here (SmolLM2, Qwen2) renders tools, and no call is parsed from a reply; describe "
    "the functions in a message, and hold the reply to a JSON Schema by response_format"
)
_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA, "minItems": 1}]}


def _joined_parts(content: object) -> object:
    """Joins text parts with newlines, as vLLM does."""
    if not isinstance(content, list):
        return content
    texts = []
    for position, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"part {position} is not of the form {{'type': 'text', 'text': '...'}}, the only one allowed"
            )
        if extra := sorted(part.keys() - _PART_KEYS):
            raise ValueError(f"part {position} has {extra[0][:60]!r}, which is not supported; remove it")
        texts.append(part["text"])
    if not texts:
        raise ValueError("an empty list of parts; give a string or at least one text part")
    return "\n".join(texts)


def _known_role(role: object) -> object:
    if role in ("tool", "function"):
        raise unsupported(f"{role!r} messages carry a call's result: {NO_TOOLS}")
    return role


class ChatMessage(Wire):
    remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(("tool_calls", "function_call", "tool_call_id"), NO_TOOLS)
    harmless: ClassVar[Harmless] = {
        "tool_calls": ([],),
        "function_call": (),
        "tool_call_id": (),
        "audio": (),
        "refusal": (),
        "annotations": ([],),
        "reasoning_content": (),
        "prefix": (False,),
    }
    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_known_role)]
    content: Annotated[Text, BeforeValidator(_joined_parts), WithJsonSchema(_CONTENT_SCHEMA)]
    name: str | None = None  # no supported template renders it

    def to_message(self) -> Message:
        return Message("system" if self.role == "developer" else self.role, self.content)


def render(
    messages: Sequence[ChatMessage], base: LoadedBase, model: ServedModel, *, generation_prompt: bool
) -> tuple[int, ...]:
    """Returns the ids of a chat as `model` was trained to read it; raises BadRequest where the template refuses it."""
    chat = with_default_system([message.to_message() for message in messages], model.system_prompt)
    rendered = render_prompt if generation_prompt else render_chat
    try:
        return rendered(base.tokenizer, chat)
    except TemplateError as error:
        raise BadRequest(f"messages: {error}", param="messages", code="invalid_messages") from error
