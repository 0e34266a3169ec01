"""Choices in flight are bounded, counted, and freed however they end."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest

from serving.engine.completion import Choice
from serving.engine.fake_engine import FakeEngine
from serving.engine.host import EngineHost
from serving.errors import BadRequest, NotReady, Overloaded
from serving.generation import Generation
from serving.metrics import Metrics
from serving.middleware import RequestFacts
from serving.registry.catalog import load_catalog
from tests.serving.engine.contract import ask, until
from tests.serving.engine.test_fake_engine import subject


@pytest.fixture(scope="module")
def catalog(tiny_base):
    return load_catalog("base", tiny_base, adapters={}, merged={})


def with_generation(catalog, check, *, ready=True):
    async def run():
        engine = FakeEngine(context_length=256, vocabulary_size=400, max_batch=2, token_delay_s=0.001)
        model = catalog.resolve("base")
        host = EngineHost(engine, [model.variant])
        generation = Generation(host, catalog, Metrics(lambda: None), max_batch=2, max_queue=1)
        if ready:
            host.start()
            await until(host.ready)
        await check(generation, model, engine)
        if ready:
            await host.stop()

    asyncio.run(run())


def start(generation, model, count, facts=None):
    request = ask(subject(), model.variant, max_tokens=100)
    choices = [Choice(index, request) for index in range(count)]
    return generation.run(model, choices, 9, facts or RequestFacts("id"))


def test_the_queue_is_bounded_and_leaving_makes_room(catalog):
    async def check(generation, model, engine):
        async with aclosing(start(generation, model, 2)) as first, aclosing(start(generation, model, 1)) as second:
            await anext(first)
            waiting = asyncio.ensure_future(anext(second))
            await until(lambda: engine.stats().waiting == 1)
            with pytest.raises(Overloaded, match="1 completions wait and the queue holds 1") as caught:
                await anext(start(generation, model, 1))
            assert caught.value.retry_after_s is not None
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert (engine.stats().running, engine.stats().waiting) == (0, 0)
        async with aclosing(start(generation, model, 3)) as third:
            await anext(third)

    with_generation(catalog, check)


def test_what_could_never_fit_is_a_bad_request(catalog):
    async def check(generation, model, engine):
        with pytest.raises(BadRequest, match="asks for 4 completions, but 3 fit"):
            await anext(start(generation, model, 4))

    with_generation(catalog, check)


def test_facts_count_the_tokens(catalog):
    async def check(generation, model, engine):
        facts = RequestFacts("id")
        assert len([piece async for piece in start(generation, model, 2, facts)]) == 200
        assert (facts.prompt_tokens, facts.completion_tokens) == (9, 200)

    with_generation(catalog, check)


def test_nothing_runs_before_the_engine_is_ready(catalog):
    async def check(generation, model, engine):
        with pytest.raises(NotReady):
            await anext(start(generation, model, 1))

    with_generation(catalog, check, ready=False)


def test_plans_run_one_after_another_in_a_thread_and_the_loop_goes_on(catalog):
    async def check(generation, model, engine):
        release, running, most = threading.Event(), [], []

        def plan():
            running.append(threading.current_thread())
            most.append(len(running))
            assert release.wait(20)
            return running.pop()

        tasks = [asyncio.create_task(generation.plan(plan)) for _ in range(3)]
        await until(lambda: bool(running))
        leaver = tasks.pop()
        leaver.cancel()
        release.set()
        threads = await asyncio.gather(*tasks)
        assert len(set(threads)) == 1
        assert threads[0] is not threading.current_thread()
        assert most == [1, 1], "and the one that left never ran"
        generation.close()
        with pytest.raises(RuntimeError):
            await generation.plan(plan)

    with_generation(catalog, check, ready=False)


def test_facts_have_the_times(catalog):
    async def check(generation, model, engine):
        facts = RequestFacts("id")
        async with aclosing(start(generation, model, 1, facts)) as pieces:
            await anext(pieces)
            assert 0 < facts.queue_s < facts.ttft_s
            assert facts.total_s is None
            async for _ in pieces:
                pass
        assert facts.ttft_s < facts.total_s

    with_generation(catalog, check)
