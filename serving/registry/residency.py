"""The residency: which adapters the engine holds now, and who waits for a place."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.engine.engine import Engine, Variant
from serving.errors import NotReady
from serving.registry.revision import DIGEST_CHARACTERS

logger = logging.getLogger("graft.registry")


@dataclass(slots=True)
class _Held:
    variant: Variant
    load_s: float
    active: int = 0
    leaving: bool = False  # takes no more requests: somebody waits for its place


@dataclass(slots=True)
class _Wanted:
    variant: Variant
    waiters: list[asyncio.Future[None]] = field(default_factory=list)

    def alive(self) -> list[asyncio.Future[None]]:
        return [waiter for waiter in self.waiters if not waiter.done()]


class Residency:
    """Adds adapters to the engine and removes them, alone. It holds at most `limit`; more wait, the oldest first.

    Where every place is busy, the least recently used adapter takes no new requests until one that waits has its place:
    an adapter in constant use cannot starve a rare one. `verify` looks at the files before each load, in a thread.
    """

    def __init__(self, limit: int, verify: Callable[[Variant], None]) -> None:
        self.limit = limit
        self._verify = verify
        self.on_load: Callable[[float], None] = lambda _: None  # hears how long each load took, in seconds
        self._engine: Engine | None = None
        self._held: dict[str, _Held] = {}  # by digest, least recently used first
        self._wanted: dict[str, _Wanted] = {}  # by digest, oldest first
        self._adding: dict[str, asyncio.Task[None]] = {}  # each takes a place
        self._removing: dict[str, asyncio.Task[None]] = {}  # each takes one until it is done
        self._pinned: frozenset[str] = frozenset()

    def attach(self, engine: Engine) -> None:
        self._engine = engine

    async def close(self) -> None:
        """Waits for what is being added or removed."""
        await asyncio.gather(*self._adding.values(), *self._removing.values(), return_exceptions=True)

    def pin(self, digests: frozenset[str]) -> None:
        """Sets which adapters are not evicted from here on."""
        self._pinned = digests
        self._settle()

    def load_s(self, digest: str) -> float | None:
        """Returns how long the engine took to load an adapter; None for one that it does not hold."""
        held = self._held.get(digest)
        return None if held is None else held.load_s

    def resident(self) -> tuple[str, ...]:
        """Returns the digests that the engine holds, least recently used first."""
        return tuple(self._held)

    def has_place(self, digest: str) -> bool:
        """Says whether an adapter is held, or could be loaded and no other would have to leave."""
        held = self._held.get(digest)
        if held is not None:
            return not held.leaving
        return digest in self._adding or self._taken() < self.limit

    async def enter(self, variant: Variant) -> None:
        """Returns once the engine holds the adapter, which then stays until `leave`; raises what its load raised."""
        if self._engine is None:
            raise NotReady("the engine is still loading; wait until GET /readyz answers 200")
        held = self._held.get(variant.digest)
        if held is not None and not held.leaving:
            self._use(held, 1)
            return
        waiter = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(variant.digest, _Wanted(variant)).waiters.append(waiter)
        self._settle()
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:  # it was let in, and does not know
                self.leave(variant)
            self._settle()
            raise

    def leave(self, variant: Variant) -> None:
        self._held[variant.digest].active -= 1
        self._settle()

    async def drop(self, digest: str) -> None:
        """Removes an adapter, which nobody uses or waits for, from the engine if it is there."""
        for tasks in (self._adding, self._removing):
            if digest in tasks:
                await asyncio.wait([tasks[digest]])
        if digest in self._held:
            await asyncio.shield(self._remove(digest))

    def _use(self, held: _Held, requests: int) -> None:
        held.active += requests
        digest = held.variant.digest
        self._held[digest] = self._held.pop(digest)

    def _settle(self) -> None:
        """Lets in whoever waits for what is held, starts the loads there is a place for, and makes places."""
        self._wanted = {digest: wanted for digest, wanted in self._wanted.items() if wanted.alive()}
        short = self._start_loads()
        if self._make_places(short):
            self._start_loads()

    def _start_loads(self) -> int:
        """Returns for how many loads there is no place."""
        short = 0
        for digest in list(self._wanted):
            held = self._held.get(digest)
            if digest in self._adding or digest in self._removing or (held is not None and held.leaving):
                continue
            if held is not None:
                self._let_in(self._wanted.pop(digest), held)
            elif self._taken() < self.limit:
                self._adding[digest] = asyncio.create_task(self._add(self._wanted.pop(digest)))
            else:
                short += 1
        return short

    def _taken(self) -> int:
        return len(self._held) + len(self._adding) + len(self._removing)

    def _make_places(self, short: int) -> bool:
        """Evicts idle adapters, least recently used first, then marks busy ones; returns whether a mark was lifted."""
        short -= len(self._removing)
        evictable = [held for digest, held in self._held.items() if digest not in self._pinned]
        for held in [each for each in evictable if not each.active][: max(short, 0)]:
            self._remove(held.variant.digest)
            short -= 1
        lifted = False
        # Who is marked stays marked: marks that moved with each use would let no place become free.
        busy = sorted((each for each in evictable if each.active), key=lambda each: not each.leaving)
        marked = busy[: max(short, 0)]
        for held in self._held.values():
            wanted = any(held is each for each in marked)
            lifted = lifted or (held.leaving and not wanted)
            held.leaving = wanted
        return lifted

    def _let_in(self, wanted: _Wanted, held: _Held) -> None:
        waiters = wanted.alive()
        self._use(held, len(waiters))
        for waiter in waiters:
            waiter.set_result(None)

    async def _add(self, wanted: _Wanted) -> None:
        assert self._engine is not None
        digest = wanted.variant.digest
        began = time.perf_counter()
        try:
            await asyncio.to_thread(self._verify, wanted.variant)
            await self._engine.add(wanted.variant)
        except Exception as error:
            for waiter in wanted.alive():
                waiter.set_exception(error)
        else:
            held = self._held[digest] = _Held(wanted.variant, time.perf_counter() - began)
            logger.info("loaded adapter %s in %.3f s", digest[:DIGEST_CHARACTERS], held.load_s)
            self.on_load(held.load_s)
            self._let_in(wanted, held)
        finally:
            del self._adding[digest]
            self._settle()

    def _remove(self, digest: str) -> asyncio.Task[None]:
        """Takes it out of what is held at once; its place is free when the task has ended."""
        held = self._held.pop(digest)
        task = self._removing[digest] = asyncio.create_task(self._free(held.variant))
        return task

    async def _free(self, variant: Variant) -> None:
        assert self._engine is not None
        try:
            await self._engine.remove(variant)
        except Exception:
            logger.exception("adapter %s was not freed", variant.digest[:DIGEST_CHARACTERS])
            raise
        finally:
            del self._removing[variant.digest]
            self._settle()
