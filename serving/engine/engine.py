"""The Engine protocol: token ids in, token ids out, several requests and several weight variants at once."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class FinishReason(enum.Enum):
    STOP = "stop"  # a stop token was generated, or the grammar allows nothing more
    LENGTH = "length"  # max_tokens, or the context is full


class VariantKind(enum.Enum):
    BASE = "base"
    ADAPTER = "adapter"
    MERGED = "merged"


@dataclass(frozen=True, slots=True)
class Variant:
    """The weights that answer one request. `digest` names them: an adapter's manifest digest, else a fingerprint."""

    name: str
    kind: VariantKind
    digest: str
    path: Path


class WeightFormat(enum.Enum):
    """How the base's weights are kept. Merged models are plain under each: their certificate is of what was written."""

    PLAIN = "plain"  # in the dtype of the arithmetic
    NF4 = "nf4"  # as QLoRA trains: 4 bits with double quantisation; embedding and head are plain
    FP16 = "fp16"  # on a CPU: linear layers rounded to 16 bits, arithmetic in fp32; the embedding is plain


@dataclass(frozen=True, slots=True)
class WeightsCost:
    """What a base's format does to its predictions, beside its plain weights: means over `tokens` of fixed replies."""

    tokens: int
    kl_nats: float  # from the plain weights' distribution
    top1_agreement: float  # share of positions with the same likeliest token
    nll_nats: float  # added to that of the replies


class Feature(enum.Enum):
    """What an engine may lack; a request that needs it is refused before the engine is asked."""

    GRAMMAR = "grammar"


class Syntax(enum.Enum):
    JSON_SCHEMA = "json_schema"  # as JSON text; the completion is JSON that fits it
    LARK = "lark"  # llguidance's dialect


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a completion must be. `field` is the request's that asked for it, named where it cannot be followed."""

    text: str
    syntax: Syntax = Syntax.JSON_SCHEMA
    field: str = "response_format.json_schema.schema"


@dataclass(frozen=True, slots=True)
class Sampling:
    """All that decides how tokens are drawn; temperature 0 is greedy.

    `logit_bias` is added to the logits of its token ids. With a `grammar` a stop token is drawn only where the
    completion is whole, and a completion that can only end does so.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`logprobs`, `prompt_logprobs`: how many alternatives to report a position; None for no log-probabilities."""

    request_id: str
    variant: Variant
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms under the model's own distribution: temperature 1, no top_p, penalties, bias or grammar."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # best first


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one completion, in order; a stop token is in none of them.

    `prompt_logprobs` stands in the first delta of a request that asked for it: one entry a prompt token, the first
    None (nothing predicts it). The last delta alone has a `finish_reason`, and may have no tokens. `waited_s`, in the
    first delta too, is how long the request waited for a row; None from an engine that does not tell.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    waited_s: float | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine is doing now."""

    running: int
    waiting: int
    steps: int  # forward passes since the start; a live engine with work moves it


class Engine(Protocol):
    """Runs requests; each method may be called from one event loop only."""

    context_length: int  # tokens, prompt and completion together
    features: frozenset[Feature]
    simulated: bool  # it has no weights, so there is nothing that peft could have computed too

    @property
    def weights_cost(self) -> WeightsCost | None:
        """What the base's format costs, where that was measured at the start; None before, and for other formats."""
        ...

    async def start(self) -> None:
        """Loads the weights; returns when requests can run."""
        ...

    async def stop(self) -> None:
        """Ends running requests with EngineDead and frees the weights."""
        ...

    async def add(self, variant: Variant) -> None:
        """Makes a variant answerable. Raises AdapterRejected where the engine cannot run it."""
        ...

    async def remove(self, variant: Variant) -> None:
        """Frees a variant that no request uses any more."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Yields the completion's deltas; closing the generator early frees its work within a step.

        `max_tokens` 0 scores the prompt only. Raises EngineDead where the engine failed.
        """
        ...

    def stats(self) -> EngineStats: ...

    def healthy(self) -> bool: ...
