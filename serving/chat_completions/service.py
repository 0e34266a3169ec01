"""The chat completion: from checked fields to engine choices, and from their pieces to a reply or its chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from serving.answer import MIN_LOGPROB, Identity, identify
from serving.chat_completions.protocol import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    ReplyMessage,
    TokenLogprobs,
    TopLogprob,
)
from serving.engine.completion import Choice, Piece
from serving.engine.text import PlacedToken
from serving.engine.vocabulary import Vocabulary
from serving.messages import render
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel
from serving.sampling import choices_for, refuse_oversized, room_for
from serving.usage import Usage, usage_of


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """All that is decided before the engine is asked."""

    identity: Identity
    choices: tuple[Choice, ...]
    prompt_tokens: int
    with_logprobs: bool
    include_usage: bool


def plan_chat(body: ChatRequest, model: ServedModel, base: LoadedBase, context_length: int) -> ChatPlan:
    """Raises ContextTooLong, or BadRequest where the template refuses the messages."""
    contents = (message.content for message in body.messages)
    refuse_oversized(contents, base.vocabulary, context_length, "messages")
    prompt_ids = render(body.messages, base, model, generation_prompt=True)
    max_tokens = room_for(len(prompt_ids), body.asked_tokens, None, context_length, "messages")
    identity = identify("chatcmpl", model)
    choices = choices_for(body, model, base.vocabulary, identity.id, [(prompt_ids, max_tokens)], body.alternatives)
    return ChatPlan(identity, choices, len(prompt_ids), body.logprobs, body.include_usage)


async def reply(plan: ChatPlan, pieces: AsyncGenerator[Piece, None], vocabulary: Vocabulary) -> ChatCompletion:
    """Folds the pieces into the whole response."""
    gathered: list[list[Piece]] = [[] for _ in plan.choices]
    async with aclosing(pieces):
        async for piece in pieces:
            gathered[piece.index].append(piece)
    identity = plan.identity
    return ChatCompletion(
        id=identity.id,
        created=identity.created,
        model=identity.model.revision,
        system_fingerprint=identity.fingerprint,
        choices=[_choice(index, own, plan.with_logprobs, vocabulary) for index, own in enumerate(gathered)],
        usage=usage_of(plan.prompt_tokens, sum(own[-1].generated for own in gathered)),
    )


async def chunks(
    plan: ChatPlan, pieces: AsyncGenerator[Piece, None], vocabulary: Vocabulary
) -> AsyncGenerator[str, None]:
    """Yields the response as chunks, in JSON: the role once a choice, text, the finish reason, and usage if asked."""
    generated = dict.fromkeys(range(len(plan.choices)), 0)
    opened: set[int] = set()
    async with aclosing(pieces):
        async for piece in pieces:
            generated[piece.index] = piece.generated
            if piece.index not in opened:
                opened.add(piece.index)
                yield _chunk(plan, ChunkChoice(index=piece.index, delta={"role": "assistant", "content": ""}))
            if piece.text or piece.tokens:
                logprobs = _logprobs(piece.tokens, vocabulary) if plan.with_logprobs else None
                yield _chunk(plan, ChunkChoice(index=piece.index, delta={"content": piece.text}, logprobs=logprobs))
            if piece.finish_reason is not None:
                yield _chunk(plan, ChunkChoice(index=piece.index, delta={}, finish_reason=piece.finish_reason.value))
    if plan.include_usage:
        yield _chunk(plan, None, usage_of(plan.prompt_tokens, sum(generated.values())))


def _choice(index: int, pieces: list[Piece], with_logprobs: bool, vocabulary: Vocabulary) -> ChatChoice:
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    reason = pieces[-1].finish_reason
    assert reason is not None  # `complete` raises where the engine gave none
    return ChatChoice(
        index=index,
        message=ReplyMessage(content="".join(piece.text for piece in pieces)),
        logprobs=_logprobs(tokens, vocabulary) if with_logprobs else None,
        finish_reason=reason.value,
    )


def _chunk(plan: ChatPlan, choice: ChunkChoice | None, usage: Usage | None = None) -> str:
    identity = plan.identity
    chunk = ChatChunk(
        id=identity.id,
        created=identity.created,
        model=identity.model.revision,
        system_fingerprint=identity.fingerprint,
        choices=[] if choice is None else [choice],
        usage=usage,
    )
    return chunk.model_dump_json(exclude=None if plan.include_usage else {"usage"})


def _logprobs(tokens: tuple[PlacedToken, ...], vocabulary: Vocabulary) -> ChatLogprobs:
    content = [
        TokenLogprobs(
            **_entry(token.logprob.token_id, token.logprob.logprob, vocabulary).model_dump(),
            top_logprobs=[_entry(token_id, logprob, vocabulary) for token_id, logprob in token.logprob.top],
        )
        for token in tokens
    ]
    return ChatLogprobs(content=content)


def _entry(token_id: int, logprob: float, vocabulary: Vocabulary) -> TopLogprob:
    return TopLogprob(
        token=vocabulary.label(token_id),
        logprob=max(logprob, MIN_LOGPROB),
        bytes=list(vocabulary.bytes_of(token_id)),
    )
