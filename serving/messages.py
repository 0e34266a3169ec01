"""The chat message: as OpenAI writes it, and as the template takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from serving.errors import BadRequest
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel
from serving.wire import Harmless, Text, Wire
from training.chat import Message, TemplateError, render_chat, render_prompt, with_default_system

MAX_MESSAGES = 512  # of a chat: the time to render one grows with the square of its replies
_PART_KEYS = {"type", "text"}


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


class ChatMessage(Wire):
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
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined_parts)]
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
