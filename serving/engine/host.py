"""The engine host: starts one engine in the background, watches it, and says when it can be asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from serving.engine.engine import Engine
from serving.engine.progress import Progress
from serving.errors import EngineDead, EngineStalled, GraftError, NotReady

logger = logging.getLogger("graft.engine")
# The slowest honest step is a first one: 64 prompt tokens of a 7B model in fp32 on two cores take about 10 s.
STALL_S = 60.0
WATCH_S = 0.5


class EngineHost:
    """Owns an engine from `start` to `stop`.

    `after_start` makes the started engine answerable before it counts as ready. `on_failure` hears of a start that
    failed, `on_death` of an engine that failed later, once. Work without a step for `stall_s` is a stall.
    """

    def __init__(
        self,
        engine: Engine,
        after_start: Callable[[Engine], Awaitable[None]],
        on_failure: Callable[[Exception], None] | None = None,
        *,
        on_death: Callable[[], None] | None = None,
        stall_s: float = STALL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._after_start = after_start
        self._on_failure, self._on_death = on_failure, on_death
        self._stall_s = stall_s
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._started = False
        self._stalled = False
        self._failure: Exception | None = None

    def start(self) -> None:
        """Begins to load; returns at once."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._engine.stop()

    def ready(self) -> bool:
        return self._started and not self._stalled and self._engine.healthy()

    def stalled(self) -> bool:
        return self._stalled

    def engine(self) -> Engine:
        """Returns the engine that can answer; raises NotReady while it loads or stalls, EngineDead where it failed."""
        if self._failure is not None:
            raise EngineDead(f"the engine did not start: {self._failure}")
        if not self._started:
            raise NotReady("the model is still loading; wait until GET /readyz answers 200")
        if not self._engine.healthy():
            raise EngineDead("the engine failed; the server has to be restarted")
        if self._stalled:
            raise EngineStalled(
                f"the engine has work and made no step for {self._stall_s:g} s; ask again once GET /readyz answers 200"
            )
        return self._engine

    async def _run(self) -> None:
        try:
            await self._engine.start()
            await self._after_start(self._engine)
        except Exception as error:
            refused = isinstance(error, GraftError | ValueError | OSError)  # their message says it all
            logger.error("the engine did not start: %s", error, exc_info=None if refused else error)
            self._failure = error
            if self._on_failure is not None:
                self._on_failure(error)
        else:
            self._started = True
            await self._watch()

    async def _watch(self) -> None:
        progress = Progress(self._clock())
        while self._engine.healthy():
            self._see(progress.still_s(self._engine.stats(), self._clock()))
            await asyncio.sleep(min(WATCH_S, self._stall_s / 4))
        logger.error("the engine failed; the server has to be restarted")
        if self._on_death is not None:
            self._on_death()

    def _see(self, still_s: float) -> None:
        stalled = still_s >= self._stall_s
        if stalled and not self._stalled:
            logger.error("the engine stalled: it has work and made no step for %.0f s", still_s)
        if self._stalled and not stalled:
            logger.warning("the engine makes steps again")
        self._stalled = stalled
