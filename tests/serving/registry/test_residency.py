"""The engine holds so many adapters, the least recently used leaves, and everyone who waits gets in."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serving.engine.engine import Variant, VariantKind
from serving.errors import AdapterRejected, NotReady
from serving.registry.residency import Residency
from tests.serving.registry.adapters import fake_engine

A, B, C, D = (Variant(name, VariantKind.ADAPTER, name * 64, Path(name)) for name in "abcd")


class Slow:
    """Counts what a residency does to an engine, which takes a moment for it; never holds more than `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held, self.log = limit, set(), []
        self.refuses = None

    async def add(self, variant):
        assert variant.digest not in self.held
        self.held.add(variant.digest)
        assert len(self.held) <= self.limit
        self.log.append(f"+{variant.name}")
        await asyncio.sleep(0.005)
        if variant == self.refuses:
            self.held.discard(variant.digest)
            raise AdapterRejected("it does not load")

    async def remove(self, variant):
        await asyncio.sleep(0.005)
        self.held.remove(variant.digest)
        self.log.append(f"-{variant.name}")


def run(check, limit, verify=lambda variant: None):
    async def body():
        engine, residency = Slow(limit), Residency(limit, verify)
        residency.attach(engine)
        await asyncio.wait_for(check(residency, engine), 20)
        await residency.close()

    asyncio.run(body())


async def use(residency, *variants):
    for variant in variants:
        await residency.enter(variant)
        residency.leave(variant)


def names(residency):
    return "".join(digest[0] for digest in residency.resident())


async def settled():
    for _ in range(10):
        await asyncio.sleep(0)


def test_the_least_recently_used_idle_one_leaves():
    async def check(residency, engine):
        await use(residency, A, B, A, C)
        assert names(residency) == "ac"
        assert engine.log == ["+a", "+b", "-b", "+c"]
        assert residency.load_s(A.digest) > 0
        assert residency.load_s(B.digest) is None

    run(check, 2)


def test_many_who_want_one_adapter_load_it_once():
    async def check(residency, engine):
        await asyncio.gather(*(residency.enter(A) for _ in range(50)))
        assert engine.log == ["+a"]
        for _ in range(50):
            residency.leave(A)
        await use(residency, B)
        assert names(residency) == "b"

    run(check, 1)


def test_there_is_a_place_for_what_is_held_and_for_more_until_another_had_to_leave():
    async def check(residency, engine):
        await use(residency, A)
        assert [residency.has_place(each.digest) for each in (A, B)] == [True, True]
        await use(residency, B)
        assert [residency.has_place(each.digest) for each in (A, B, C)] == [True, True, False]
        await residency.enter(A)
        await residency.enter(B)
        waiting = asyncio.create_task(residency.enter(C))
        await settled()
        assert [residency.has_place(each.digest) for each in (A, B)].count(False) == 1, "one is about to leave"
        residency.leave(A)
        residency.leave(B)
        await waiting

    run(check, 2)


def test_what_is_used_is_never_evicted_and_who_waits_gets_its_place():
    async def check(residency, engine):
        await residency.enter(A)
        waiting = asyncio.create_task(residency.enter(B))
        await settled()
        assert (names(residency), waiting.done()) == ("a", False)
        residency.leave(A)
        await waiting
        assert names(residency) == "b"

    run(check, 1)


def test_a_pinned_one_stays():
    async def check(residency, engine):
        residency.pin(frozenset({A.digest}))
        await use(residency, A, B, C, D)
        assert names(residency) == "ad"
        residency.pin(frozenset())
        await use(residency, B)
        assert "a" not in names(residency)

    run(check, 2)


def test_an_adapter_in_constant_use_does_not_starve_a_rare_one():
    """At no moment is A idle: each of its requests begins before the last has ended."""

    async def check(residency, engine):
        stop = asyncio.Event()

        async def busy():
            await residency.enter(A)
            while not stop.is_set():
                following = asyncio.create_task(residency.enter(A))
                await asyncio.sleep(0.002)
                residency.leave(A)
                await following
            residency.leave(A)

        task = asyncio.create_task(busy())
        await asyncio.sleep(0.02)
        await use(residency, B, C, B)
        stop.set()
        await task
        assert engine.log[:6] == ["+a", "-a", "+b", "-b", "+a", "-a"], "the two take turns"

    run(check, 1)


def test_who_stops_waiting_leaves_no_trace():
    async def check(residency, engine):
        await residency.enter(A)
        waiting = asyncio.create_task(residency.enter(B))
        await settled()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await use(residency, A)
        loading = asyncio.create_task(residency.enter(B))  # and one who leaves while it loads
        residency.leave(A)
        await asyncio.sleep(0.008)
        assert engine.log[-1] == "+b"
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await use(residency, C)
        assert names(residency) == "c"

    run(check, 1)


def test_a_load_that_fails_fails_for_all_who_wait_and_frees_its_place():
    async def check(residency, engine):
        engine.refuses = A
        results = await asyncio.gather(residency.enter(A), residency.enter(A), return_exceptions=True)
        assert [type(each) for each in results] == [AdapterRejected] * 2
        await use(residency, B)
        engine.refuses = None
        await use(residency, A)
        assert names(residency) == "a"

    run(check, 1)


def test_files_are_looked_at_before_each_load():
    seen = []

    async def check(residency, engine):
        await use(residency, A, B, A)

    run(check, 1, lambda variant: seen.append(variant.name))
    assert seen == ["a", "b", "a"]


def test_dropping_frees_the_engine_and_is_harmless_where_there_is_nothing():
    async def check(residency, engine):
        await use(residency, A)
        await residency.drop(A.digest)
        await residency.drop(A.digest)
        assert (names(residency), engine.held) == ("", set())

    run(check, 1)


def test_nothing_loads_before_there_is_an_engine():
    async def check():
        residency = Residency(1, lambda variant: None)
        with pytest.raises(NotReady):
            await residency.enter(A)
        residency.attach(fake_engine())
        await residency.enter(A)
        await residency.close()

    asyncio.run(check())


def test_a_hundred_requests_at_random_all_get_in():
    async def check(residency, engine):
        variants = [Variant(str(n), VariantKind.ADAPTER, f"{n:064}", Path(str(n))) for n in range(12)]

        async def request(number):
            variant = variants[number * 7 % 12]
            await asyncio.sleep(number % 13 / 1000)
            await residency.enter(variant)
            assert variant.digest in engine.held
            await asyncio.sleep(number % 5 / 1000)
            assert variant.digest in engine.held
            residency.leave(variant)

        await asyncio.gather(*(request(number) for number in range(100)))

    run(check, 3)
