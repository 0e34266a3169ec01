"""The engine host: starts one engine in the background, adds every variant, and says when it can be asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from serving.engine.engine import Engine, Variant
from serving.errors import EngineDead, GraftError, NotReady

logger = logging.getLogger("graft.engine")


class EngineHost:
    """Owns an engine from `start` to `stop`; `on_failure` hears of a start that failed."""

    def __init__(
        self, engine: Engine, variants: Sequence[Variant], on_failure: Callable[[Exception], None] | None = None
    ) -> None:
        self._engine = engine
        self._variants = tuple(variants)
        self._on_failure = on_failure
        self._task: asyncio.Task[None] | None = None
        self._started = False
        self._failure: Exception | None = None

    def start(self) -> None:
        """Begins to load; returns at once."""
        self._task = asyncio.create_task(self._start())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._engine.stop()

    def ready(self) -> bool:
        return self._started and self._engine.healthy()

    def engine(self) -> Engine:
        """Returns the engine once it can answer; raises NotReady while it loads and EngineDead where it failed."""
        if self._failure is not None:
            raise EngineDead(f"the engine did not start: {self._failure}")
        if not self._started:
            raise NotReady("the model is still loading; wait until GET /readyz answers 200")
        if not self._engine.healthy():
            raise EngineDead("the engine failed; the server has to be restarted")
        return self._engine

    async def _start(self) -> None:
        try:
            await self._engine.start()
            for variant in self._variants:
                await self._engine.add(variant)
        except Exception as error:
            refused = isinstance(error, GraftError | ValueError | OSError)  # their message says it all
            logger.error("the engine did not start: %s", error, exc_info=None if refused else error)
            self._failure = error
            if self._on_failure is not None:
                self._on_failure(error)
        else:
            self._started = True
