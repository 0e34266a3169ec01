"""The progress watch: tells an engine that has work and makes no step from one that is idle."""

from __future__ import annotations

from serving.engine.engine import EngineStats


class Progress:
    """Remembers when the engine last made a step or had no work; times come from the caller's clock."""

    def __init__(self, now_s: float) -> None:
        self._steps = -1
        self._moved_s = now_s

    def still_s(self, stats: EngineStats, now_s: float) -> float:
        """Returns for how many seconds the engine has had work and made no step; 0 where it goes on."""
        idle = stats.running + stats.waiting == 0
        if idle or stats.steps != self._steps:
            self._steps, self._moved_s = stats.steps, now_s
        return now_s - self._moved_s
