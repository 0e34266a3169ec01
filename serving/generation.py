"""The generation: runs one HTTP request's choices on the engine, admitted, timed and counted."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager

from serving.engine.completion import Choice, Piece, complete_all
from serving.engine.engine import Engine
from serving.engine.host import EngineHost
from serving.errors import BadRequest, Overloaded
from serving.metrics import Metrics, Stopwatch
from serving.middleware import RequestFacts
from serving.registry.catalog import Catalog, ServedModel


class Generation:
    """What chat and text completions share. It counts choices itself: a burst would slip past the engine's counts."""

    def __init__(self, host: EngineHost, catalog: Catalog, metrics: Metrics, *, max_batch: int, max_queue: int) -> None:
        self.catalog = catalog
        self._host = host
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._in_flight = 0  # choices

    def engine(self) -> Engine:
        """Raises NotReady or EngineDead where no request can run."""
        return self._host.engine()

    async def run(
        self, model: ServedModel, choices: Sequence[Choice], prompt_tokens: int, facts: RequestFacts
    ) -> AsyncGenerator[Piece, None]:
        """Yields the choices' pieces as they come; closing it frees their work. Raises Overloaded before the first."""
        watch = Stopwatch(self._metrics, model.name, facts.arrived_s)
        generated: dict[int, int] = {}
        with self._admitted(len(choices)):
            self._metrics.prompt_tokens.labels(model.name).inc(prompt_tokens)
            facts.prompt_tokens = prompt_tokens
            async with aclosing(complete_all(self.engine(), self.catalog.base.vocabulary, choices)) as pieces:
                async for piece in pieces:
                    watch.see(piece)
                    generated[piece.index] = piece.generated
                    facts.completion_tokens = sum(generated.values())
                    yield piece
        watch.end()

    @contextmanager
    def _admitted(self, count: int) -> Iterator[None]:
        if count > self._max_batch + self._max_queue:
            raise BadRequest(
                f"the request asks for {count} completions, but {self._max_batch + self._max_queue} fit into batch and "
                "queue; send fewer prompts or a smaller n",
                code="too_many_completions",
            )
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
