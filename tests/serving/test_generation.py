"""Choices in flight are bounded, counted, and freed however they end."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest

from serving.auth import Caller, Limits
from serving.engine.completion import Choice
from serving.engine.fake_engine import FakeEngine
from serving.engine.host import EngineHost
from serving.errors import BadRequest, DeadlineExceeded, Forbidden, NotReady, Overloaded, RateLimited
from serving.fair_queue import FairQueue
from serving.generation import INLINE_BYTES, Generation
from serving.limits import Limiter
from serving.metrics import Metrics
from serving.middleware import RequestFacts
from serving.registry.catalog import load_catalog
from tests.serving.engine.contract import ask, until
from tests.serving.engine.test_fake_engine import subject

LONG = INLINE_BYTES + 1


@pytest.fixture(scope="module")
def catalog(tiny_base):
    return load_catalog("base", tiny_base, {})


def with_generation(catalog, check, *, ready=True):
    async def run():
        engine = FakeEngine(context_length=256, vocabulary_size=400, max_batch=2, token_delay_s=0.001)
        model = catalog.models["base"]
        host = EngineHost(engine, lambda engine: engine.add(model.variant))
        generation = Generation(
            host, catalog.base.vocabulary, Metrics(lambda: None), FairQueue(2, 1), Limiter(clock=lambda: 0.0)
        )
        if ready:
            host.start()
            await until(host.ready)
        await check(generation, model, engine)
        if ready:
            await host.stop()

    asyncio.run(run())


def start(generation, model, count, facts=None, max_tokens=100):
    request = ask(subject(), model.variant, max_tokens=max_tokens)
    choices = [Choice(index, request) for index in range(count)]
    return generation.run(model, choices, 9, facts or RequestFacts("id"))


def test_the_queue_is_bounded_and_leaving_makes_room(catalog):
    async def check(generation, model, engine):
        async with aclosing(start(generation, model, 2)) as first, aclosing(start(generation, model, 1)) as second:
            await anext(first)
            waiting = asyncio.ensure_future(anext(second))
            await asyncio.sleep(0)
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

        tasks = [asyncio.create_task(generation.plan(plan, LONG)) for _ in range(3)]
        await until(lambda: bool(running))
        leaver = tasks.pop()
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        await asyncio.sleep(0)  # its job hears of it a turn later
        release.set()
        threads = await asyncio.gather(*tasks)
        assert len(set(threads)) == 1
        assert threads[0] is not threading.current_thread()
        assert most == [1, 1], "and the one that left never ran"
        generation.close()
        with pytest.raises(RuntimeError):
            await generation.plan(plan, LONG)

    with_generation(catalog, check, ready=False)


def test_a_short_request_is_planned_at_once_and_never_beside_another(catalog):
    async def check(generation, model, engine):
        release, begun = threading.Event(), threading.Event()

        def plan():
            begun.set()
            return release.wait(20)

        assert await generation.plan(threading.current_thread, INLINE_BYTES) is threading.current_thread()
        long = asyncio.create_task(generation.plan(plan, LONG))
        await until(begun.is_set)
        long.cancel()  # its client leaves; the thread goes on
        await asyncio.gather(long, return_exceptions=True)
        short = asyncio.create_task(generation.plan(threading.current_thread, INLINE_BYTES))
        await asyncio.sleep(0.01)
        assert not short.done()
        release.set()
        assert await short is not threading.current_thread()
        await until(lambda: not generation._plans)
        assert await generation.plan(threading.current_thread, INLINE_BYTES) is threading.current_thread()
        generation.close()

    with_generation(catalog, check, ready=False)


def test_as_many_plans_wait_as_may_and_no_more(catalog, monkeypatch):
    monkeypatch.setattr("serving.generation.MAX_PLANS", 2)

    async def check(generation, model, engine):
        release = threading.Event()
        tasks = [asyncio.create_task(generation.plan(lambda: release.wait(20), LONG)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 requests wait to be planned") as caught:
            await generation.plan(int, LONG)
        assert caught.value.retry_after_s == 2
        tasks.pop().cancel()
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(generation.plan(lambda: release.wait(20), LONG)))
        await asyncio.sleep(0)
        release.set()
        assert await asyncio.gather(*tasks) == [True, True]
        assert await generation.plan(int, LONG) == 0
        generation.close()

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


def facts_of_ann(tokens=None, models=("*",), timeout_s=None):
    return RequestFacts("id", caller=Caller("ann", frozenset(models), limits=Limits(None, tokens)), timeout_s=timeout_s)


def left(generation, facts):
    return int(generation._limiter.headers(facts.caller)["x-ratelimit-remaining-tokens"])


def test_a_key_runs_only_its_models(catalog):
    async def check(generation, model, engine):
        with pytest.raises(Forbidden, match="key 'ann' may not use model 'base'"):
            await anext(start(generation, model, 1, facts_of_ann(models=["other"])))
        assert [piece async for piece in start(generation, model, 1, facts_of_ann(models=["base"]))]

    with_generation(catalog, check)


def test_tokens_are_reserved_and_what_was_not_generated_is_given_back(catalog):
    async def check(generation, model, engine):
        facts = facts_of_ann(tokens=300)
        async with aclosing(start(generation, model, 2, facts)) as pieces:
            await anext(pieces)
            assert left(generation, facts) == 300 - 9 - 200
            with pytest.raises(RateLimited):
                await anext(start(generation, model, 1, facts))
        assert 300 - 9 - 20 < left(generation, facts) < 300 - 9, "the prompt and a few tokens"
        before = left(generation, facts)
        with pytest.raises(BadRequest, match="can use 609 tokens"):
            await anext(start(generation, model, 3, facts, max_tokens=200))
        assert left(generation, facts) == before

    with_generation(catalog, check)


def test_a_request_that_never_had_a_row_costs_no_tokens(catalog):
    async def check(generation, model, engine):
        facts = facts_of_ann(tokens=900)
        async with aclosing(start(generation, model, 2)) as pieces:
            await anext(pieces)
            waiting = asyncio.ensure_future(anext(start(generation, model, 1, facts)))
            await asyncio.sleep(0.01)
            assert left(generation, facts) == 900 - 109
            with pytest.raises(Overloaded):
                await anext(start(generation, model, 1, facts))
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert left(generation, facts) == 900

    with_generation(catalog, check)


def test_tokens_that_nobody_read_are_paid_for_and_hold_no_row(catalog):
    async def check(generation, model, engine):
        facts = facts_of_ann(tokens=900)
        async with aclosing(start(generation, model, 2, facts)) as slow:
            await anext(slow)
            await until(lambda: engine.stats().running == 0)  # all was generated, a piece was read
            others = [piece async for piece in start(generation, model, 2)]
            assert len(others) == 200
        assert left(generation, facts) == 900 - 209

    with_generation(catalog, check)


def test_the_deadline_ends_what_runs_and_what_waits(catalog):
    async def check(generation, model, engine):
        async with aclosing(start(generation, model, 1, RequestFacts("id"), max_tokens=200)) as long:
            await anext(long)
            running = start(generation, model, 1, facts_of_ann(timeout_s=1.0), max_tokens=200)
            await anext(running)
            engine._token_delay_s = 60.0  # neither ends by itself
            waiting = start(generation, model, 1, facts_of_ann(timeout_s=0.02))
            with pytest.raises(DeadlineExceeded, match="x-request-timeout-s") as caught:
                await anext(waiting)
            assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
            with pytest.raises(DeadlineExceeded):
                async for _ in running:
                    pass
            assert (engine.stats().running, engine.aborted) == (1, 1)
        with pytest.raises(DeadlineExceeded):
            await anext(start(generation, model, 1, facts_of_ann(timeout_s=-1.0)))

    with_generation(catalog, check)


def test_a_deadline_ends_what_a_slow_reader_left_unread(catalog):
    async def check(generation, model, engine):
        async with aclosing(start(generation, model, 1, facts_of_ann(timeout_s=1.0), max_tokens=200)) as slow:
            await anext(slow)
            engine._token_delay_s = 60.0  # it does not end by itself
            await until(lambda: engine.stats().running == 0)
            assert engine.aborted == 1
            with pytest.raises(DeadlineExceeded):
                async for _ in slow:
                    pass

    with_generation(catalog, check)


def test_the_wait_at_the_gateway_is_the_queue_time(catalog):
    async def check(generation, model, engine):
        facts = RequestFacts("id")
        async with aclosing(start(generation, model, 2)) as pieces:
            await anext(pieces)
            waiting = asyncio.ensure_future(anext(start(generation, model, 1, facts)))
            await asyncio.sleep(0.05)
        await waiting
        assert facts.queue_s > 0.04

    with_generation(catalog, check)
