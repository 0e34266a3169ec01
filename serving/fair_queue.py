"""The fair queue: completions wait here for a row of the engine, and models take turns, and callers within a model."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from serving.errors import Overloaded

MAX_RETRY_S = 120  # OpenAI's client ignores a longer Retry-After
UNMEASURED_RETRY_S = 2  # before any completion has ended
SMOOTHING = 0.1  # of the mean over completions: the last 20 count for nearly all


class Place:
    """One completion's place: it waits, then holds a row, until it leaves; each at most once."""

    __slots__ = ("_caller", "_came_s", "_left", "_queue", "_revision", "_turn", "granted_s")

    def __init__(self, queue: FairQueue, revision: str, caller: str, came_s: float) -> None:
        self._queue = queue
        self._revision, self._caller = revision, caller
        self._came_s = came_s
        self._turn: asyncio.Future[None] | None = None
        self._left = False
        self.granted_s: float | None = None  # when the row came

    @property
    def lane(self) -> tuple[str, str]:
        return self._revision, self._caller

    async def turn(self) -> float:
        """Returns once the row is there, with the seconds that it took."""
        if self.granted_s is None:
            self._turn = asyncio.get_running_loop().create_future()
            await self._turn
        assert self.granted_s is not None
        return self.granted_s - self._came_s

    def grant(self, now_s: float) -> None:
        self.granted_s = now_s
        if self._turn is not None and not self._turn.done():  # done: cancelled, and about to leave
            self._turn.set_result(None)

    def leave(self) -> None:
        """Gives the row, or the place in the queue, to the next; again: nothing."""
        if not self._left:
            self._left = True
            self._queue.left(self)


class FairQueue:
    """Hands out `rows` rows and lets `room` completions wait; a lane is one caller's wait for one model revision."""

    def __init__(self, rows: int, room: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._rows, self._room, self._free = rows, room, rows
        self._clock = clock
        self._waiting = 0
        self._lanes: OrderedDict[str, OrderedDict[str, deque[Place]]] = OrderedDict()
        self._mean_held_s: float | None = None

    @property
    def capacity(self) -> int:
        return self._rows + self._room

    def check(self, count: int) -> None:
        """Raises Overloaded where `count` more completions do not all fit."""
        if self._waiting + max(0, count - self._free) > self._room:
            raise Overloaded(
                f"{self._waiting} completions wait and the queue holds {self._room}; try again later",
                retry_after_s=self._retry_s(),
            )

    @contextmanager
    def places(self, revision: str, caller: str, count: int) -> Iterator[Sequence[Place]]:
        """Gives `count` places for as long as the block lasts. Raises Overloaded where they do not all fit."""
        self.check(count)
        now_s = self._clock()
        places = [Place(self, revision, caller, now_s) for _ in range(count)]
        for place in places:
            self._lanes.setdefault(revision, OrderedDict()).setdefault(caller, deque()).append(place)
        self._waiting += count
        self._fill(now_s)
        try:
            yield places
        finally:
            for place in places:
                place.leave()

    def left(self, place: Place) -> None:
        """Hands the row on in the same turn of the event loop, so that the engine is not left with an empty one."""
        now_s = self._clock()
        if place.granted_s is None:
            revision, caller = place.lane
            self._lanes[revision][caller].remove(place)
            self._waiting -= 1
            self._forget_empty(revision, caller)
            return
        held_s = now_s - place.granted_s
        mean_s = held_s if self._mean_held_s is None else self._mean_held_s
        self._mean_held_s = mean_s + SMOOTHING * (held_s - mean_s)
        self._free += 1
        self._fill(now_s)

    def running(self) -> int:
        return self._rows - self._free

    def waiting(self) -> Mapping[str, int]:
        """Returns how many completions wait, by model revision; revisions without any are left out."""
        counts: Counter[str] = Counter()
        for revision, callers in self._lanes.items():
            counts[revision] = sum(map(len, callers.values()))
        return counts

    def _fill(self, now_s: float) -> None:
        while self._free and self._lanes:
            self._free -= 1
            self._waiting -= 1
            self._next().grant(now_s)

    def _next(self) -> Place:
        """Takes from the revision, and there the caller, that was served longest ago, and sends both to the back."""
        revision, callers = next(iter(self._lanes.items()))
        caller, places = next(iter(callers.items()))
        place = places.popleft()
        callers.move_to_end(caller)
        self._lanes.move_to_end(revision)
        self._forget_empty(revision, caller)
        return place

    def _forget_empty(self, revision: str, caller: str) -> None:
        callers = self._lanes[revision]
        if not callers[caller]:
            del callers[caller]
        if not callers:
            del self._lanes[revision]

    def _retry_s(self) -> int:
        """Returns when all that waits now will have been served, at the rate at which rows came free lately."""
        if self._mean_held_s is None:
            return UNMEASURED_RETRY_S
        return min(MAX_RETRY_S, max(1, math.ceil(self._waiting * self._mean_held_s / self._rows)))
