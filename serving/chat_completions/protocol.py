"""The chat completion on the wire: OpenAI's request, response and chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from serving.engine.engine import Feature
from serving.errors import BadRequest, UnsupportedField
from serving.messages import MAX_MESSAGES, OLD_CALLS, ChatMessage
from serving.sampling import SHARED_HARMLESS, SamplingFields
from serving.tools.offer import AUTO, is_held
from serving.tools.protocol import Choice, Tools, check_names
from serving.tools.turns import check_calls
from serving.usage import Usage
from serving.wire import Harmless


class ChatRequest(SamplingFields):
    remedies: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("functions", "function_call"), OLD_CALLS),
        "reasoning_effort": "remove it: no chat template that is proven here reads it",
    }
    harmless: ClassVar[Harmless] = {
        **SHARED_HARMLESS,
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
    tools: Tools = Field(default_factory=list)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        self.check_stream_options()
        check_calls(self.messages)
        if self.tools or self.tool_choice is not None:
            self._check_tools()
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true; set it or remove top_logprobs", param="top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise BadRequest(
                f"max_tokens is {both[0]} and max_completion_tokens {both[1]}; give one, or the same number twice",
                param="max_completion_tokens",
            )
        return self

    def _check_tools(self) -> None:
        check_names(self.tools, self.tool_choice)
        if self.may_call and self.response_format is not None and self.response_format.type != "text":
            raise BadRequest(
                f"response_format is {self.response_format.type}, which a call is not; give type text, or tool_choice "
                "'none', or remove tools",
                param="response_format",
            )

    @property
    def may_call(self) -> bool:
        """Whether functions are offered; with tool_choice none they are not even rendered."""
        return bool(self.tools) and (self.tool_choice is None or self.tool_choice.mode != "none")

    def check_features(self, features: frozenset[Feature]) -> None:
        super().check_features(features)
        if self.may_call and Feature.GRAMMAR not in features and is_held(self.tools, self.tool_choice or AUTO):
            strict = (place for place, tool in enumerate(self.tools) if tool.function.strict)
            forced = self.tool_choice is not None and self.tool_choice.mode == "required"
            param = "tool_choice" if forced else f"tools[{next(strict)}].function.strict"
            remedy = "give 'auto'" if forced else "remove it"
            raise UnsupportedField(
                f"{param}: the engine that runs here cannot hold a reply to a call; {remedy}, or start the server with "
                "--engine transformers or vllm",
                param=param,
            )

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


class CalledFunction(BaseModel):
    name: str
    arguments: str  # JSON text


class ReplyCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CallingMessage(BaseModel):
    """`content` is null where the reply has no text beside its calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ReplyCall]


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage | CallingMessage
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
