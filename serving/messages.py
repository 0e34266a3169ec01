"""The chat message: as OpenAI writes it, and as the template takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticKnownError

from serving.errors import BadRequest
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel
from serving.tools.call_format import call_format
from serving.tools.protocol import MAX_TOOLS, MadeCall, Tool
from serving.wire import Harmless, Text, Wire, unsupported
from training.chat import Message, TemplateError, render_chat, render_prompt, with_default_system

MAX_MESSAGES = 512  # of a chat: the time to render one grows with the square of its replies
_PART_KEYS = {"type", "text"}
OLD_CALLS = "it is OpenAI's old form; use tools, tool_choice, tool_calls, and messages of role 'tool'"
_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA, "minItems": 1}]}


def _whole_content(content: object, info: ValidationInfo) -> object:
    """Joins text parts with newlines, as vLLM does. An assistant that calls functions needs no content."""
    if isinstance(content, str):
        return content
    if content is None and info.data.get("role") == "assistant" and info.data.get("tool_calls"):
        return ""
    if content is None:
        raise PydanticKnownError("missing")
    return _joined_parts(content) if isinstance(content, list) else content


def _joined_parts(content: list[Any]) -> str:
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
    if role == "function":
        raise unsupported(OLD_CALLS)
    return role


class ChatMessage(Wire):
    remedies: ClassVar[Mapping[str, str]] = {"function_call": OLD_CALLS}
    harmless: ClassVar[Harmless] = {
        "function_call": (),
        "audio": (),
        "refusal": (),
        "annotations": ([],),
        "reasoning_content": (),
        "prefix": (False,),
    }
    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_known_role)]
    name: str | None = None  # no supported template renders it
    tool_calls: list[MadeCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: Text | None = None
    content: Annotated[Text, BeforeValidator(_whole_content), WithJsonSchema(_CONTENT_SCHEMA)] = Field(
        None, validate_default=True
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        reference = super().__get_pydantic_json_schema__(core_schema, handler)
        schema = handler.resolve_ref_schema(reference)
        result = {"role": {"const": "tool"}, "content": _CONTENT_SCHEMA, "tool_call_id": {"type": "string"}}
        calls = {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}}
        other = {"role": {"not": {"const": "tool"}}, "content": _CONTENT_SCHEMA}
        schema["anyOf"] = [
            {"properties": other, "required": ["content"]},
            {"properties": result, "required": ["content", "tool_call_id"]},
            {"properties": calls, "required": ["tool_calls"]},
        ]
        return reference

    @property
    def is_of_calls(self) -> bool:
        return self.role == "tool" or bool(self.tool_calls) or self.tool_call_id is not None

    def to_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        if not self.is_of_calls:
            return Message(role, self.content)
        return Message(role, self.content, tuple(call.to_call() for call in self.tool_calls or ()), self.tool_call_id)


def render(
    messages: Sequence[ChatMessage],
    base: LoadedBase,
    model: ServedModel,
    *,
    generation_prompt: bool,
    tools: Sequence[Tool] = (),
) -> tuple[int, ...]:
    """Returns the ids of a chat as `model` was trained to read it; raises BadRequest where the template refuses it.

    Whether it renders `tools` is to be seen before; whether it renders the messages' calls is seen here.
    """
    if not tools and any(message.is_of_calls for message in messages):
        call_format(base, model, "messages")
    chat = with_default_system([message.to_message() for message in messages], model.system_prompt)
    rendered = render_prompt if generation_prompt else render_chat
    try:
        return rendered(base.tokenizer, chat, [tool.for_template() for tool in tools])
    except TemplateError as error:
        raise BadRequest(f"messages: {error}", param="messages", code="invalid_messages") from error
