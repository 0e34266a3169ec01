"""The generation: plans one HTTP request, and runs its choices on the engine, admitted, timed and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import TypeVar

from serving.engine.completion import Choice, Piece, complete_all
from serving.engine.engine import Engine
from serving.engine.host import EngineHost
from serving.errors import BadRequest, Overloaded
from serving.metrics import Metrics, Stopwatch
from serving.middleware import RequestFacts
from serving.registry.catalog import Catalog, ServedModel

T = TypeVar("T")


class Generation:
    """What chat and text completions share. It counts choices itself: a burst would slip past the engine's counts."""

    def __init__(self, host: EngineHost, catalog: Catalog, metrics: Metrics, *, max_batch: int, max_queue: int) -> None:
        self.catalog = catalog
        self._host = host
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._in_flight = 0  # choices
        # Exactly one thread: encoding sets options on the tokenizer, which all requests share.
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="planner")

    async def plan(self, make: Callable[[], T]) -> T:
        """Returns `make()`, which renders or encodes; it runs beside the event loop, one request's after another's."""
        return await asyncio.get_running_loop().run_in_executor(self._planner, make)

    def close(self) -> None:
        """Ends the planner's thread after what it does now."""
        self._planner.shutdown(wait=False, cancel_futures=True)

    def engine(self) -> Engine:
        """Raises NotReady or EngineDead where no request can run."""
        return self._host.engine()

    async def run(
        self, model: ServedModel, choices: Sequence[Choice], prompt_tokens: int, facts: RequestFacts
    ) -> AsyncGenerator[Piece, None]:
        """Yields the choices' pieces as they come; closing it frees their work. Raises Overloaded before the first."""
        watch = Stopwatch(self._metrics, model.name, facts.arrived_s)
        before_s = time.perf_counter() - facts.arrived_s
        generated: dict[int, int] = {}
        with self._admitted(len(choices)):
            self._metrics.prompt_tokens.labels(model.name).inc(prompt_tokens)
            facts.prompt_tokens = prompt_tokens
            async with aclosing(complete_all(self.engine(), self.catalog.base.vocabulary, choices)) as pieces:
                async for piece in pieces:
                    watch.see(piece)
                    facts.ttft_s = watch.ttft_s
                    if facts.queue_s is None and piece.waited_s is not None:
                        facts.queue_s = before_s + piece.waited_s
                    generated[piece.index] = piece.generated
                    facts.completion_tokens = sum(generated.values())
                    yield piece
        facts.total_s = watch.end()

    def refuse_too_many(self, count: int) -> None:
        """Raises BadRequest for more completions than could ever be admitted at once."""
        if count > self._max_batch + self._max_queue:
            raise BadRequest(
                f"the request asks for {count} completions, but {self._max_batch + self._max_queue} fit into batch and "
                "queue; send fewer prompts or a smaller n",
                code="too_many_completions",
            )

    @contextmanager
    def _admitted(self, count: int) -> Iterator[None]:
        self.refuse_too_many(count)
        if self._in_flight + count > self._max_batch + self._max_queue:
            waiting = max(self._in_flight - self._max_batch, 0)
            raise Overloaded(f"{waiting} completions wait and the queue holds {self._max_queue}; try again later")
        self._in_flight += count
        try:
            yield
        finally:
            self._in_flight -= count

    def stream_failed(self, code: str, facts: RequestFacts) -> None:
        facts.stream_error = code
        self._metrics.stream_errors.labels(code).inc()
