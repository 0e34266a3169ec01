"""The completion: an engine's deltas as text pieces, for several choices at once; streams and replies fold them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from serving.engine.engine import Delta, FinishReason, GenerationRequest, TokenLogprob
from serving.engine.text import PlacedToken, TextStream
from serving.engine.vocabulary import Vocabulary
from serving.errors import DeadlineExceeded, EngineDead


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
    token_ids: tuple[int, ...] = ()  # as the Delta's


class Generates(Protocol):
    """What is needed of an Engine."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]: ...


async def complete(engine: Generates, vocabulary: Vocabulary, choice: Choice) -> AsyncGenerator[Piece, None]:
    """Yields one choice's pieces; the last alone has a `finish_reason`. Leaving it early aborts the engine's work."""
    text = TextStream(vocabulary, choice.stop)
    generated = 0
    async with aclosing(engine.generate(choice.request)) as deltas:
        async for delta in deltas:
            generated += len(delta.token_ids)
            gained = text.push(delta.token_ids, delta.logprobs, final=delta.finish_reason is not None)
            reason = FinishReason.STOP if text.stopped else delta.finish_reason
            yield Piece(
                index=choice.index,
                text=gained.text,
                tokens=gained.tokens,
                generated=generated,
                prompt_logprobs=delta.prompt_logprobs,
                finish_reason=reason,
                waited_s=delta.waited_s,
                token_ids=delta.token_ids,
            )
            if reason is not None:
                return
    raise EngineDead(f"the engine ended request {choice.request.request_id} without a finish reason; send it again")


async def complete_all(
    engine: Generates,
    vocabulary: Vocabulary,
    choices: Sequence[Choice],
    within_s: float | None = None,
    *,
    buffered: bool = True,
) -> AsyncGenerator[Piece, None]:
    """Runs the choices at once and yields their pieces as they come. The first error ends them all.

    A slow reader holds up no choice: what it has not read is kept, at most `max_tokens` pieces a choice. Raises
    DeadlineExceeded where a choice does not end `within_s`; its work is freed then, read or not. Who waits for nothing
    but the next piece needs them not `buffered`: a choice alone then runs in the reader's own task, in fewer turns.
    """
    if len(choices) == 1 and not buffered:
        try:
            async with asyncio.timeout(within_s) as limit, aclosing(complete(engine, vocabulary, choices[0])) as pieces:
                async for piece in pieces:
                    yield piece
        except TimeoutError as error:
            raise (_too_late() if limit.expired() else error) from None
        return
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(complete(engine, vocabulary, choice), queue, within_s)) for choice in choices]
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


async def _pump(
    pieces: AsyncGenerator[Piece, None], queue: asyncio.Queue[Piece | Exception | None], within_s: float | None
) -> None:
    try:
        async with asyncio.timeout(within_s) as limit, aclosing(pieces):
            async for piece in pieces:
                queue.put_nowait(piece)
        queue.put_nowait(None)
    except Exception as error:  # raised again by the reader, with its traceback
        queue.put_nowait(_too_late() if limit.expired() else error)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "the time that the request may take is over; ask for fewer tokens, raise x-request-timeout-s, or have the "
        "server's --deadline-s raised"
    )
