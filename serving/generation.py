"""The generation: plans one HTTP request, and runs its choices on the engine, admitted, timed and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from serving.auth import ANONYMOUS
from serving.engine.completion import Choice, Piece, complete_all
from serving.engine.engine import Delta, Engine, GenerationRequest
from serving.engine.host import EngineHost
from serving.engine.vocabulary import Vocabulary
from serving.errors import BadRequest, Overloaded
from serving.fair_queue import FairQueue, Place
from serving.limits import Limiter, Spending
from serving.metrics import Metrics, Stopwatch
from serving.middleware import RequestFacts
from serving.registry.catalog import ServedModel

T = TypeVar("T")
INLINE_BYTES = 1024  # mostly planned in 0.6 ms; in 7 ms at worst: 200 prompts of one letter
MAX_PLANS = 256  # at once: they wait for one thread, first in, first out, before they wait for a row


class Generation:
    """What chat and text completions share: planning, and running within the key's limits and the queue's turns."""

    def __init__(
        self, host: EngineHost, vocabulary: Vocabulary, metrics: Metrics, queue: FairQueue, limiter: Limiter
    ) -> None:
        self._host = host
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._queue = queue
        self._limiter = limiter
        # One at a time: encoding sets options on the tokenizer, which all requests share.
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._plans: set[Future[Any]] = set()  # of the thread

    async def plan(self, make: Callable[[], T], body_bytes: int) -> T:
        """Returns `make()`, which renders or encodes what a body of so many bytes asks for, one after another.

        It runs beside the event loop, unless that would take longer than the work itself. Raises Overloaded where
        MAX_PLANS wait already.
        """
        if body_bytes <= INLINE_BYTES and not self._plans:
            return make()
        if len(self._plans) >= MAX_PLANS:
            raise Overloaded(f"{len(self._plans)} requests wait to be planned, the most that may; try again later")
        plan = self._planner.submit(make)
        self._plans.add(plan)  # until it is made, or is left before it has begun: the tokenizer is in use so long
        plan.add_done_callback(self._plans.discard)
        return await asyncio.wrap_future(plan)

    def close(self) -> None:
        """Ends the planner's thread after what it does now."""
        self._planner.shutdown(wait=False, cancel_futures=True)

    def engine(self) -> Engine:
        """Raises NotReady or EngineDead where no request can run."""
        return self._host.engine()

    async def run(
        self,
        model: ServedModel,
        choices: Sequence[Choice],
        prompt_tokens: int,
        facts: RequestFacts,
        *,
        buffered: bool = True,
    ) -> AsyncGenerator[Piece, None]:
        """Yields the choices' pieces as they come, `buffered` as complete_all does; closing it frees their work.

        Raises Forbidden, RateLimited and Overloaded before the first, and DeadlineExceeded at any time.
        """
        caller = facts.caller or ANONYMOUS
        caller.check_model(model.name)
        self.refuse_too_many(len(choices))
        watch = Stopwatch(self._metrics, model.name, facts.arrived_s, facts.arm)
        facts.planned_s = before_s = time.perf_counter() - facts.arrived_s
        most = prompt_tokens + sum(choice.request.sampling.max_tokens for choice in choices)
        generated: dict[int, int] = {}
        with (
            self._limiter.tokens(caller, most) as spending,
            self._queue.places(model.revision, caller.name, len(choices)) as places,
        ):
            self._metrics.prompt_tokens.labels(model.name, facts.arm).inc(prompt_tokens)
            facts.prompt_tokens = prompt_tokens
            engine = _Queued(self.engine(), places, prompt_tokens, spending)
            left_s = facts.left_s()
            made = complete_all(engine, self._vocabulary, choices, left_s, buffered=buffered)
            async with aclosing(made) as pieces:
                async for piece in pieces:
                    watch.see(piece)
                    facts.ttft_s = watch.ttft_s
                    if facts.queue_s is None and piece.waited_s is not None:
                        facts.queue_s = before_s + piece.waited_s
                        watch.queued(facts.queue_s)
                    generated[piece.index] = piece.generated
                    facts.completion_tokens = sum(generated.values())
                    yield piece
        facts.total_s = watch.end()

    def refuse_when_full(self) -> None:
        """Raises Overloaded where nothing more fits, before time is spent on a plan."""
        self._queue.check(1)

    def refuse_too_many(self, count: int) -> None:
        """Raises BadRequest for more completions than could ever be admitted at once."""
        if count > self._queue.capacity:
            raise BadRequest(
                f"the request asks for {count} completions, but {self._queue.capacity} fit into batch and queue; send "
                "fewer prompts or a smaller n",
                code="too_many_completions",
            )


class _Queued:
    """An engine whose requests wait for their places first; counts what they spend as it is made, read or not."""

    def __init__(self, engine: Engine, places: Sequence[Place], prompt_tokens: int, spending: Spending) -> None:
        self._engine = engine
        self._places = iter(places)
        self._prompt_tokens = prompt_tokens
        self._spending = spending

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        place = next(self._places)
        try:
            waited_s: float | None = await place.turn()
            self._spending.tokens = max(self._spending.tokens, self._prompt_tokens)  # once for all choices
            async with aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    self._spending.tokens += len(delta.token_ids)
                    if waited_s is None:
                        yield delta
                    else:
                        yield replace(delta, waited_s=waited_s + (delta.waited_s or 0.0))
                        waited_s = None
        finally:
            place.leave()
