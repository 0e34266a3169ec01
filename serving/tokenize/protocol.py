"""The tokenization on the wire, in vLLM's words."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field, model_validator

from serving.errors import BadRequest
from serving.messages import MAX_MESSAGES, ChatMessage
from serving.tools.protocol import Tools, check_names
from serving.tools.turns import check_calls
from serving.wire import Harmless, Text, Wire


class TokenizeRequest(Wire):
    """Exactly one of `prompt` and `messages`; `tools` are rendered as a chat completion that may call them does."""

    harmless: ClassVar[Harmless] = {
        "add_special_tokens": (),
        "return_token_strs": (False,),
        "continue_final_message": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "mm_processor_kwargs": ({},),
    }
    model: str
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool = True
    tools: Tools = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("give either prompt or messages, not both and not none", param="prompt")
        if self.prompt is not None and "add_generation_prompt" in self.model_fields_set:
            raise BadRequest("add_generation_prompt needs messages; remove it", param="add_generation_prompt")
        if self.prompt is not None and self.tools:
            raise BadRequest("tools need messages; remove them", param="tools")
        check_calls(self.messages or ())
        check_names(self.tools, None)
        return self


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int  # the context, in tokens
