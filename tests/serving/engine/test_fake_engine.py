"""The fake engine keeps the contract of a real one, and can be scripted and killed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serving.engine.engine import Variant, VariantKind
from serving.engine.fake_engine import FakeEngine
from serving.errors import EngineDead, ModelNotFound
from tests.serving.engine.contract import CHECKS, Subject, ask, gather, run_check, until

BASE = Variant("base", VariantKind.BASE, "b" * 64, Path("base"))
ADAPTERS = tuple(Variant(name, VariantKind.ADAPTER, digit * 64, Path(name)) for name, digit in (("a", "1"), ("c", "2")))


def subject(**options) -> Subject:
    settings = {"context_length": 256, "vocabulary_size": 400, "token_delay_s": 0.0005, **options}
    return Subject(lambda: FakeEngine(**settings), BASE, ADAPTERS, tuple(range(5, 14)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    run_check(check, subject())


def test_the_sweep_finds_the_checks():
    assert len({check.__name__ for check in CHECKS}) == len(CHECKS) >= 20


def test_a_script_is_what_greedy_says():
    async def check(engine, about):
        assert (await gather(engine, ask(about, max_tokens=3))).token_ids == (7, 8, 9)

    run_check(check, subject(script=(7, 8, 9)))


def test_an_end_of_turn_comes_now_and_then():
    async def check(engine, about):
        fields = {"max_tokens": 200, "stop_token_ids": frozenset({2})}
        lengths = [
            len((await gather(engine, ask(about, **fields, temperature=1.0, seed=s))).token_ids) for s in range(9)
        ]
        assert min(lengths) < 200
        assert len(set(lengths)) > 3

    run_check(check, subject(end_of_turn_id=2, token_delay_s=0))


def test_without_an_end_of_turn_no_reply_ends_by_itself():
    async def check(engine, about):
        fields = {"max_tokens": 240, "stop_token_ids": frozenset(range(40)), "logprobs": 24}
        for seed in range(5):
            outcome = await gather(engine, ask(about, **fields, temperature=1.0, seed=seed))
            assert len(outcome.token_ids) == 240
            assert min(token_id for entry in outcome.logprobs for token_id, _ in entry.top) >= 40

    run_check(check, subject(control_ids=frozenset(range(40)), token_delay_s=0))


def test_rows_over_the_batch_wait_and_an_abort_counts():
    async def check(engine, about):
        tasks = [asyncio.create_task(gather(engine, ask(about, max_tokens=200))) for _ in range(3)]
        await until(lambda: engine.stats().waiting == 2)
        assert engine.stats().running == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (engine.aborted, engine.stats().running, engine.stats().waiting) == (3, 0, 0)
        await gather(engine, ask(about))
        assert engine.aborted == 3, "a request that ends is not aborted"

    run_check(check, subject(max_batch=1))


def test_death_ends_running_and_waiting_requests():
    async def check(engine, about):
        tasks = [asyncio.create_task(gather(engine, ask(about, max_tokens=200))) for _ in range(2)]
        await until(lambda: engine.stats().waiting == 1)
        engine.die()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineDead, EngineDead]
        assert not engine.healthy()

    run_check(check, subject(max_batch=1))


def test_a_variant_that_was_not_added_is_refused():
    async def check(engine, about):
        await engine.remove(ADAPTERS[0])
        with pytest.raises(ModelNotFound, match="was not added"):
            await gather(engine, ask(about, ADAPTERS[0]))

    run_check(check, subject())
