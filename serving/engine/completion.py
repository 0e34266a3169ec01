"""The completion: an engine's deltas as text pieces, for several choices at once; streams and replies fold them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from serving.engine.engine import Engine, FinishReason, GenerationRequest, TokenLogprob
from serving.engine.text import PlacedToken, TextStream
from serving.engine.vocabulary import Vocabulary
from serving.errors import EngineDead


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion to generate; `index` is its place in the response."""

    index: int
    request: GenerationRequest
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one choice gained. `tokens` is empty unless log-probabilities were asked for."""

    index: int
    text: str
    tokens: tuple[PlacedToken, ...]
    generated: int  # tokens of this choice so far
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: FinishReason | None
    waited_s: float | None = None  # as the Delta's


async def complete(engine: Engine, vocabulary: Vocabulary, choice: Choice) -> AsyncGenerator[Piece, None]:
    """Yields one choice's pieces; the last alone has a `finish_reason`. Leaving it early aborts the engine's work."""
    text = TextStream(vocabulary, choice.stop)
    generated = 0
    async with aclosing(engine.generate(choice.request)) as deltas:
        async for delta in deltas:
            generated += len(delta.token_ids)
            gained = text.push(delta.token_ids, delta.logprobs, final=delta.finish_reason is not None)
            reason = FinishReason.STOP if text.stopped else delta.finish_reason
            yield Piece(
                choice.index, gained.text, gained.tokens, generated, delta.prompt_logprobs, reason, delta.waited_s
            )
            if reason is not None:
                return
    raise EngineDead(f"the engine ended request {choice.request.request_id} without a finish reason; send it again")


async def complete_all(
    engine: Engine, vocabulary: Vocabulary, choices: Sequence[Choice]
) -> AsyncGenerator[Piece, None]:
    """Runs the choices at once and yields their pieces as they come. The first error ends them all."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(maxsize=len(choices))
    tasks = [asyncio.create_task(_pump(complete(engine, vocabulary, choice), queue)) for choice in choices]
    try:
        live = len(tasks)
        while live:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                live -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(pieces: AsyncGenerator[Piece, None], queue: asyncio.Queue[Piece | Exception | None]) -> None:
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                await queue.put(piece)
        await queue.put(None)
    except Exception as error:  # raised again by the reader, with its traceback
        await queue.put(error)
