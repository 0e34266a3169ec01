"""The host says truly whether its engine can be asked."""

from __future__ import annotations

import asyncio

import pytest

from serving.engine.fake_engine import FakeEngine
from serving.engine.host import EngineHost
from serving.errors import AdapterRejected, EngineDead, NotReady
from tests.serving.engine.contract import ask, gather, until
from tests.serving.engine.test_fake_engine import ADAPTERS, BASE, subject


class Refusing(FakeEngine):
    async def add(self, variant):
        if variant == ADAPTERS[1]:
            raise AdapterRejected("adapter c has modules that the base lacks")
        await super().add(variant)


def test_it_is_not_ready_until_all_variants_are_added():
    async def run():
        engine = FakeEngine(context_length=64, vocabulary_size=400, start_delay_s=0.05)
        host = EngineHost(engine, [BASE, *ADAPTERS])
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
        host = EngineHost(Refusing(context_length=64, vocabulary_size=400), [BASE, *ADAPTERS], heard.append)
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
        host = EngineHost(FakeEngine(context_length=64, vocabulary_size=400, start_delay_s=60), [BASE])
        host.start()
        await asyncio.sleep(0)
        await asyncio.wait_for(host.stop(), 5)
        assert not host.ready()

    asyncio.run(run())
