"""The host says truly whether its engine can be asked."""

from __future__ import annotations

import asyncio

import pytest

from serving.engine.engine import EngineStats
from serving.engine.fake_engine import FakeEngine
from serving.engine.host import EngineHost
from serving.errors import AdapterRejected, EngineDead, EngineStalled, NotReady
from tests.serving.engine.contract import ask, gather, until
from tests.serving.engine.test_fake_engine import ADAPTERS, BASE, subject


async def add_all(engine):
    for variant in (BASE, *ADAPTERS):
        await engine.add(variant)


class Refusing(FakeEngine):
    async def add(self, variant):
        if variant == ADAPTERS[1]:
            raise AdapterRejected("adapter c has modules that the base lacks")
        await super().add(variant)


def test_it_is_not_ready_until_all_variants_are_added():
    async def run():
        engine = FakeEngine(context_length=64, vocabulary_size=400, start_delay_s=0.05)
        host = EngineHost(engine, add_all)
        host.start()
        assert not host.ready()
        with pytest.raises(NotReady, match="readyz"):
            host.engine()
        await until(host.ready)
        for variant in (BASE, *ADAPTERS):
            await gather(host.engine(), ask(subject(), variant))
        engine.die()
        assert not host.ready()
        with pytest.raises(EngineDead, match="restarted"):
            host.engine()
        await host.stop()

    asyncio.run(run())


def test_a_refused_variant_is_told():
    async def run():
        heard = []
        host = EngineHost(Refusing(context_length=64, vocabulary_size=400), add_all, heard.append)
        host.start()
        await until(lambda: bool(heard))
        assert isinstance(heard[0], AdapterRejected)
        assert not host.ready()
        with pytest.raises(EngineDead, match="modules that the base lacks"):
            host.engine()
        await host.stop()

    asyncio.run(run())


def test_it_can_stop_while_it_starts():
    async def run():
        host = EngineHost(FakeEngine(context_length=64, vocabulary_size=400, start_delay_s=60), add_all)
        host.start()
        await asyncio.sleep(0)
        await asyncio.wait_for(host.stop(), 5)
        assert not host.ready()

    asyncio.run(run())


class Meter(FakeEngine):
    """Says of its work what the test says."""

    work = EngineStats(running=0, waiting=0, steps=0)

    def stats(self):
        return self.work


def test_a_stalled_engine_is_not_ready_until_it_makes_a_step(caplog):
    async def run():
        engine, deaths = Meter(context_length=64, vocabulary_size=400), []
        host = EngineHost(engine, add_all, on_death=lambda: deaths.append(1), stall_s=0.02)
        host.start()
        await until(host.ready)
        await asyncio.sleep(0.1)
        assert host.ready(), "it is idle"
        engine.work = EngineStats(running=1, waiting=0, steps=5)
        await until(host.stalled)
        assert not host.ready()
        with pytest.raises(EngineStalled, match=r"no step for 0.02 s; ask again once GET /readyz") as caught:
            host.engine()
        assert (caught.value.status, caught.value.code) == (503, "engine_stalled")
        engine.work = EngineStats(running=1, waiting=0, steps=6)
        await until(host.ready)
        assert deaths == []
        await host.stop()
        assert deaths == [], "a stop that was asked for is no death"

    asyncio.run(run())
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "the engine stalled" in caplog.text
    assert "makes steps again" in caplog.text


def test_a_death_is_told_once():
    async def run():
        engine, deaths, failures = FakeEngine(context_length=64, vocabulary_size=400), [], []
        host = EngineHost(engine, add_all, failures.append, on_death=lambda: deaths.append(1), stall_s=0.04)
        host.start()
        await until(host.ready)
        engine.die()
        await until(lambda: bool(deaths))
        await asyncio.sleep(0.05)
        await host.stop()
        assert (deaths, failures) == ([1], [])

    asyncio.run(run())
