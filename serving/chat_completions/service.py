"""The chat completion: from checked fields to engine choices, and from their pieces to a reply or its chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from serving.answer import MIN_LOGPROB, Identity, identify
from serving.chat_completions.protocol import (
    CalledFunction,
    CallingMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    ReplyCall,
    ReplyMessage,
    TokenLogprobs,
    TopLogprob,
)
from serving.engine.completion import Choice, Piece
from serving.engine.engine import FinishReason
from serving.engine.text import PlacedToken
from serving.engine.vocabulary import Vocabulary
from serving.messages import render
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel
from serving.sampling import choices_for, refuse_oversized, room_for
from serving.tools.offer import AUTO, Offer, make_offer
from serving.tools.reply import CallDeltas, read_reply
from serving.tools.turns import texts_of
from serving.usage import Usage, usage_of


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """All that is decided before the engine is asked."""

    identity: Identity
    choices: tuple[Choice, ...]
    prompt_tokens: int
    with_logprobs: bool
    include_usage: bool
    offer: Offer | None = None  # of functions to call


def plan_chat(body: ChatRequest, model: ServedModel, base: LoadedBase, context_length: int) -> ChatPlan:
    """Raises ContextTooLong, or BadRequest where the template refuses the messages."""
    refuse_oversized(texts_of(body.messages), base.vocabulary, context_length, "messages")
    offer = _offer(body, model, base)
    tools = () if offer is None else offer.tools
    prompt_ids = render(body.messages, base, model, generation_prompt=True, tools=tools)
    max_tokens = room_for(len(prompt_ids), body.asked_tokens, None, context_length, "messages")
    identity = identify("chatcmpl", model)
    choices = choices_for(
        body,
        model,
        base.vocabulary,
        identity.id,
        [(prompt_ids, max_tokens)],
        body.alternatives,
        grammar=None if offer is None else offer.grammar(),
        stop=() if offer is None else offer.stop,
    )
    return ChatPlan(identity, choices, len(prompt_ids), body.logprobs, body.include_usage, offer)


def _offer(body: ChatRequest, model: ServedModel, base: LoadedBase) -> Offer | None:
    if not body.may_call:
        return None
    return make_offer(body.tools, body.tool_choice or AUTO, base, model, parallel=body.parallel_tool_calls)


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
        choices=[_choice(index, own, plan, vocabulary) for index, own in enumerate(gathered)],
        usage=usage_of(plan.prompt_tokens, sum(own[-1].generated for own in gathered)),
    )


async def chunks(
    plan: ChatPlan, pieces: AsyncGenerator[Piece, None], vocabulary: Vocabulary
) -> AsyncGenerator[str, None]:
    """Yields the response as chunks, in JSON: the role once a choice, text, the finish reason, and usage if asked."""
    writers = [] if plan.offer is None else [CallDeltas(plan.offer) for _ in plan.choices]
    generated = dict.fromkeys(range(len(plan.choices)), 0)
    opened: set[int] = set()
    async with aclosing(pieces):
        async for piece in pieces:
            generated[piece.index] = piece.generated
            if piece.index not in opened:
                opened.add(piece.index)
                yield _chunk(plan, ChunkChoice(index=piece.index, delta={"role": "assistant", "content": ""}))
            if writers:
                for part in _call_parts(plan, piece, writers[piece.index], vocabulary):
                    yield _chunk(plan, part)
                continue
            if piece.text or piece.tokens:
                logprobs = _logprobs(piece.tokens, vocabulary) if plan.with_logprobs else None
                yield _chunk(plan, ChunkChoice(index=piece.index, delta={"content": piece.text}, logprobs=logprobs))
            if piece.finish_reason is not None:
                yield _chunk(plan, ChunkChoice(index=piece.index, delta={}, finish_reason=piece.finish_reason.value))
    if plan.include_usage:
        yield _chunk(plan, None, usage_of(plan.prompt_tokens, sum(generated.values())))


def _call_parts(plan: ChatPlan, piece: Piece, writer: CallDeltas, vocabulary: Vocabulary) -> Iterator[ChunkChoice]:
    """Log-probabilities are of all tokens, a call's too; they stand in the first chunk of their piece."""
    deltas = writer.push(piece.text, piece.finish_reason)
    logprobs = _logprobs(piece.tokens, vocabulary) if plan.with_logprobs and piece.tokens else None
    for delta in deltas or ([] if logprobs is None else [dict[str, Any]()]):
        yield ChunkChoice(index=piece.index, delta=delta, logprobs=logprobs)
        logprobs = None
    if piece.finish_reason is not None:
        yield ChunkChoice(index=piece.index, delta={}, finish_reason=writer.finish_reason(piece.finish_reason))


def _choice(index: int, pieces: list[Piece], plan: ChatPlan, vocabulary: Vocabulary) -> ChatChoice:
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    text, reason = "".join(piece.text for piece in pieces), pieces[-1].finish_reason
    assert reason is not None  # `complete` raises where the engine gave none
    message, finish = (
        (ReplyMessage(content=text), reason.value) if plan.offer is None else _read(plan.offer, text, reason)
    )
    return ChatChoice(
        index=index,
        message=message,
        logprobs=_logprobs(tokens, vocabulary) if plan.with_logprobs else None,
        finish_reason=finish,
    )


def _read(offer: Offer, text: str, reason: FinishReason) -> tuple[ReplyMessage | CallingMessage, str]:
    read = read_reply(offer, text, reason)
    if not read.calls:
        return ReplyMessage(content=read.content or ""), read.finish_reason
    calls = [
        ReplyCall(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments)) for call in read.calls
    ]
    return CallingMessage(content=read.content, tool_calls=calls), read.finish_reason


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
