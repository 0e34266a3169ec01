"""The chat completion on the wire: OpenAI's request, response and chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from serving.errors import BadRequest
from serving.messages import MAX_MESSAGES, NO_TOOLS, ChatMessage
from serving.sampling import SHARED_HARMLESS, SamplingFields
from serving.usage import Usage
from serving.wire import Harmless


class ChatRequest(SamplingFields):
    remedies: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("tools", "tool_choice", "functions", "function_call"), NO_TOOLS),
        "reasoning_effort": "remove it: no chat template that is proven here reads it",
    }
    harmless: ClassVar[Harmless] = {
        **SHARED_HARMLESS,
        "tools": ([],),
        "tool_choice": ("none", "auto"),  # without tools both mean a plain reply
        "parallel_tool_calls": None,  # speaks of tools, which are refused
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning": (),
        "reasoning_effort": (),
        "thinking": (),
        "verbosity": (),
        "web_search_options": (),
        "moderation": (),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "documents": ([],),
        "mm_processor_kwargs": ({},),
        "echo": (False,),
    }
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        self.check_stream_options()
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true; set it or remove top_logprobs", param="top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise BadRequest(
                f"max_tokens is {both[0]} and max_completion_tokens {both[1]}; give one, or the same number twice",
                param="max_completion_tokens",
            )
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives a token are reported; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs]
    refusal: None = None


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(BaseModel):
    index: int
    delta: dict[str, Any]
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
