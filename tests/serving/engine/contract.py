"""The engine contract: what every engine must do, as async checks. An engine's test runs all of CHECKS.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_it_keeps_the_contract(check, subject):
        run_check(check, subject)

A Subject's prompt must be short, and its greedy completions long: at least 24 tokens with no stop token.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import jsonschema_rs
import pytest
from transformers import AutoTokenizer

from serving.engine.engine import (
    Engine,
    FinishReason,
    GenerationRequest,
    Grammar,
    Sampling,
    Syntax,
    TokenLogprob,
    Variant,
)
from serving.engine.vocabulary import read_vocabulary
from serving.errors import EngineDead
from tests.serving.engine.schemas import SCHEMAS
from training.chat import end_of_turn_id

TOKENS = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """`make` returns a new engine that has not started; `base` and `adapters` are what it must answer with."""

    make: Callable[[], Engine]
    base: Variant
    adapters: tuple[Variant, ...]
    prompt_ids: tuple[int, ...]
    tolerance_nats: float = 1e-3  # between the same token scored in two ways


@dataclass(frozen=True, slots=True)
class Outcome:
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: FinishReason | None


Check = Callable[[Engine, Subject], Awaitable[None]]


def run_check(check: Check, subject: Subject, timeout_s: float = 120.0) -> None:
    """Starts a new engine with all variants, runs one check, stops the engine."""

    async def run() -> None:
        engine = subject.make()
        await engine.start()
        try:
            for variant in (subject.base, *subject.adapters):
                await engine.add(variant)
            await asyncio.wait_for(check(engine, subject), timeout_s)
        finally:
            await engine.stop()

    asyncio.run(run())


def ask(subject: Subject, variant: Variant | None = None, **fields) -> GenerationRequest:
    """A greedy request of TOKENS tokens, unless `fields` (of the request or its sampling) say otherwise."""
    own = {key: fields.pop(key) for key in ("prompt_ids", "logprobs", "prompt_logprobs") if key in fields}
    sampling = Sampling(**{"max_tokens": TOKENS, "temperature": 0.0, **fields})
    request = GenerationRequest(f"contract-{id(sampling)}", variant or subject.base, subject.prompt_ids, sampling)
    return replace(request, **own)


async def gather(engine: Engine, request: GenerationRequest) -> Outcome:
    """Folds the deltas, and holds what the Delta's docstring says of every stream."""
    deltas = [delta async for delta in engine.generate(request)]
    assert deltas, "a stream has at least one delta"
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert all(delta.prompt_logprobs is None for delta in deltas[1:])
    assert deltas[0].waited_s is None or deltas[0].waited_s >= 0
    assert all(delta.waited_s is None for delta in deltas[1:])
    for delta in deltas:
        if request.logprobs is None:
            assert delta.logprobs == ()
        else:
            assert [entry.token_id for entry in delta.logprobs] == list(delta.token_ids)
    return Outcome(
        tuple(token_id for delta in deltas for token_id in delta.token_ids),
        tuple(entry for delta in deltas for entry in delta.logprobs),
        deltas[0].prompt_logprobs,
        deltas[-1].finish_reason,
    )


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    for _ in range(int(timeout_s / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail(f"the condition did not come true in {timeout_s} s")


def assert_valid(entry: TokenLogprob, count: int) -> None:
    """Log-probabilities of one position: at most 1 in sum, best first, consistent with the token's own."""
    listed = [logprob for _, logprob in entry.top]
    assert len(listed) == count
    assert listed == sorted(listed, reverse=True)
    assert len({token_id for token_id, _ in entry.top}) == count
    assert all(logprob <= 1e-6 for logprob in [*listed, entry.logprob])
    every = {**dict(entry.top), entry.token_id: entry.logprob}
    assert math.fsum(map(math.exp, every.values())) <= 1 + 1e-4
    if entry.token_id in dict(entry.top):
        assert dict(entry.top)[entry.token_id] == pytest.approx(entry.logprob, abs=1e-6)
    elif listed:
        assert entry.logprob <= listed[-1] + 1e-6


async def greedy_is_deterministic(engine: Engine, subject: Subject) -> None:
    first, second = [await gather(engine, ask(subject)) for _ in range(2)]
    assert first == second


async def max_tokens_is_exact(engine: Engine, subject: Subject) -> None:
    for count in (1, 2, TOKENS):
        outcome = await gather(engine, ask(subject, max_tokens=count))
        assert len(outcome.token_ids) == count
        assert outcome.finish_reason is FinishReason.LENGTH


async def a_stop_token_ends_and_is_in_no_delta(engine: Engine, subject: Subject) -> None:
    whole = (await gather(engine, ask(subject, max_tokens=24, logprobs=0))).token_ids
    stop_id = whole[len(whole) // 2]
    outcome = await gather(engine, ask(subject, max_tokens=24, logprobs=0, stop_token_ids=frozenset({stop_id})))
    assert outcome.token_ids == whole[: whole.index(stop_id)]
    assert outcome.finish_reason is FinishReason.STOP


async def a_stop_token_may_come_first(engine: Engine, subject: Subject) -> None:
    first = (await gather(engine, ask(subject, max_tokens=1))).token_ids[0]
    outcome = await gather(engine, ask(subject, prompt_logprobs=1, stop_token_ids=frozenset({first})))
    assert outcome.token_ids == ()
    assert outcome.finish_reason is FinishReason.STOP
    assert outcome.prompt_logprobs is not None


async def prompt_logprobs_cover_the_prompt(engine: Engine, subject: Subject) -> None:
    for count in (0, 3):
        outcome = await gather(engine, ask(subject, prompt_logprobs=count))
        assert outcome.prompt_logprobs is not None
        assert outcome.prompt_logprobs[0] is None
        entries = [entry for entry in outcome.prompt_logprobs[1:] if entry is not None]
        assert tuple(entry.token_id for entry in entries) == subject.prompt_ids[1:]
        for entry in entries:
            assert_valid(entry, count)


async def no_logprobs_unless_asked(engine: Engine, subject: Subject) -> None:
    outcome = await gather(engine, ask(subject))
    assert outcome.logprobs == ()
    assert outcome.prompt_logprobs is None


async def logprobs_are_a_distribution(engine: Engine, subject: Subject) -> None:
    for count in (0, 1, 5):
        outcome = await gather(engine, ask(subject, logprobs=count))
        assert len(outcome.logprobs) == TOKENS
        for entry in outcome.logprobs:
            assert_valid(entry, count)
            if count:
                assert entry.top[0][1] == pytest.approx(entry.logprob, abs=1e-6), "greedy draws the likeliest"


async def logprobs_ignore_temperature_and_penalties(engine: Engine, subject: Subject) -> None:
    fields = {"temperature": 1.7, "top_p": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5, "seed": 3}
    drawn = await gather(engine, ask(subject, logprobs=2, **fields))
    scored = await gather(engine, scoring(subject, drawn.token_ids))
    assert_same_scores(drawn, scored, subject)


async def scoring_agrees_with_generation(engine: Engine, subject: Subject) -> None:
    for variant in (subject.base, *subject.adapters):
        drawn = await gather(engine, ask(subject, variant, logprobs=0, temperature=1.0, seed=11))
        scored = await gather(engine, scoring(subject, drawn.token_ids, variant))
        assert_same_scores(drawn, scored, subject)


def scoring(subject: Subject, completion_ids: tuple[int, ...], variant: Variant | None = None) -> GenerationRequest:
    prompt_ids = subject.prompt_ids + completion_ids
    return ask(subject, variant, prompt_ids=prompt_ids, prompt_logprobs=0, max_tokens=0)


def assert_same_scores(drawn: Outcome, scored: Outcome, subject: Subject) -> None:
    assert scored.prompt_logprobs is not None
    again = [entry for entry in scored.prompt_logprobs[len(subject.prompt_ids) :] if entry is not None]
    assert len(again) == len(drawn.logprobs) > 0
    for one, other in zip(drawn.logprobs, again, strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=subject.tolerance_nats)


async def a_seed_reproduces(engine: Engine, subject: Subject) -> None:
    drawn = {}
    for seed in (1, 2, 3, 4):
        request = ask(subject, temperature=1.5, seed=seed, max_tokens=16)
        drawn[seed] = (await gather(engine, request)).token_ids
        assert (await gather(engine, request)).token_ids == drawn[seed]
    assert len(set(drawn.values())) > 1, "seeds have to make a difference"


async def a_seed_reproduces_in_company(engine: Engine, subject: Subject) -> None:
    request = ask(subject, temperature=1.0, seed=5)
    alone = await gather(engine, request)
    others = [gather(engine, ask(subject, temperature=1.0, seed=seed, max_tokens=seed)) for seed in (3, 7)]
    together = await asyncio.gather(gather(engine, request), *others)
    assert together[0].token_ids == alone.token_ids


async def a_tiny_nucleus_is_greedy(engine: Engine, subject: Subject) -> None:
    greedy = await gather(engine, ask(subject))
    assert (await gather(engine, ask(subject, temperature=1.0, top_p=1e-6, seed=9))).token_ids == greedy.token_ids


async def penalties_avoid_repetition(engine: Engine, subject: Subject) -> None:
    free, avoiding = [
        (await gather(engine, ask(subject, max_tokens=24, **fields))).token_ids
        for fields in ({}, {"presence_penalty": 2.0, "frequency_penalty": 2.0})
    ]
    assert len(set(avoiding)) >= len(set(free))
    assert avoiding[0] == free[0], "the prompt is not penalised"


async def a_bias_forces_and_forbids_tokens(engine: Engine, subject: Subject) -> None:
    free = await gather(engine, ask(subject, logprobs=1))
    forbidden = await gather(engine, ask(subject, logit_bias=((free.token_ids[0], -100.0),)))
    assert forbidden.token_ids[0] != free.token_ids[0]
    forced = await gather(engine, ask(subject, logprobs=1, logit_bias=((forbidden.token_ids[0], 100.0),)))
    assert forced.token_ids == (forbidden.token_ids[0],) * TOKENS
    assert forced.logprobs[0].top == free.logprobs[0].top, "log-probabilities are the model's own"


async def leaving_frees_the_work(engine: Engine, subject: Subject) -> None:
    async with aclosing(engine.generate(ask(subject, max_tokens=engine.context_length // 2))) as deltas:
        await anext(deltas)
        assert engine.stats().running == 1
    await until(lambda: engine.stats().running == 0)


async def cancelling_frees_the_work(engine: Engine, subject: Subject) -> None:
    long = ask(subject, max_tokens=engine.context_length // 2)
    tasks = [asyncio.create_task(gather(engine, long)) for _ in range(3)]
    await until(lambda: engine.stats().running + engine.stats().waiting == 3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: engine.stats().running + engine.stats().waiting == 0)
    assert len((await gather(engine, ask(subject))).token_ids) == TOKENS


async def variants_in_one_batch_equal_each_alone(engine: Engine, subject: Subject) -> None:
    requests = [ask(subject, variant, max_tokens=16) for variant in (subject.base, *subject.adapters)]
    requests += [replace(request, prompt_ids=request.prompt_ids[:-1]) for request in requests]
    alone = [(await gather(engine, request)).token_ids for request in requests]
    together = await asyncio.gather(*(gather(engine, request) for request in requests))
    assert [outcome.token_ids for outcome in together] == alone
    assert len(set(alone[: 1 + len(subject.adapters)])) > 1, "the variants have to answer differently"


async def late_joiners_change_nothing(engine: Engine, subject: Subject) -> None:
    alone = (await gather(engine, ask(subject, max_tokens=20))).token_ids
    tokens: list[int] = []
    async with aclosing(engine.generate(ask(subject, max_tokens=20))) as deltas:
        async for delta in deltas:
            tokens += delta.token_ids
            if len(tokens) in (3, 9):
                await gather(engine, ask(subject, subject.adapters[0], max_tokens=2))
    assert tuple(tokens) == alone


async def max_tokens_0_scores_the_prompt(engine: Engine, subject: Subject) -> None:
    outcome = await gather(engine, ask(subject, max_tokens=0, prompt_logprobs=1))
    assert outcome.token_ids == ()
    assert outcome.finish_reason is FinishReason.LENGTH
    assert outcome.prompt_logprobs is not None
    assert len(outcome.prompt_logprobs) == len(subject.prompt_ids)


async def a_full_context_ends_with_length(engine: Engine, subject: Subject) -> None:
    repeats = engine.context_length // len(subject.prompt_ids) + 1
    prompt_ids = (subject.prompt_ids * repeats)[: engine.context_length - 3]
    outcome = await gather(engine, ask(subject, prompt_ids=prompt_ids, max_tokens=50))
    assert len(outcome.token_ids) == 3
    assert outcome.finish_reason is FinishReason.LENGTH


async def a_variant_can_leave_and_return(engine: Engine, subject: Subject) -> None:
    adapter = subject.adapters[0]
    before = await gather(engine, ask(subject, adapter))
    base = await gather(engine, ask(subject))
    await engine.remove(adapter)
    assert await gather(engine, ask(subject)) == base
    await engine.add(adapter)
    assert await gather(engine, ask(subject, adapter)) == before


async def stats_move_with_the_work(engine: Engine, subject: Subject) -> None:
    before = engine.stats()
    assert (before.running, before.waiting) == (0, 0)
    await gather(engine, ask(subject))
    assert engine.stats().steps >= before.steps + TOKENS
    await until(lambda: engine.stats().running == 0)
    assert engine.healthy()


async def stopping_ends_requests_with_engine_dead(engine: Engine, subject: Subject) -> None:
    task = asyncio.create_task(gather(engine, ask(subject, max_tokens=engine.context_length // 2)))
    await until(lambda: engine.stats().running == 1)
    await engine.stop()
    with pytest.raises(EngineDead):
        await task
    assert not engine.healthy()
    with pytest.raises(EngineDead):
        await gather(engine, ask(subject))


def constrained(subject: Subject, schema: object, seed: int, **fields) -> GenerationRequest:
    stops = frozenset({end_of_turn_id(_tokenizer(subject))})
    sampling = {"temperature": 1.0, "max_tokens": 200, "stop_token_ids": stops, "seed": seed, **fields}
    return ask(subject, **{"grammar": Grammar(json.dumps(schema)), **sampling})


def _tokenizer(subject: Subject) -> Any:
    return AutoTokenizer.from_pretrained(subject.base.path)


async def a_grammar_holds_at_temperature_1(engine: Engine, subject: Subject) -> None:
    vocabulary = read_vocabulary(_tokenizer(subject))
    ended = 0
    for name, schema in SCHEMAS.items():
        outcomes = await asyncio.gather(*(gather(engine, constrained(subject, schema, seed)) for seed in range(3)))
        for outcome in outcomes:
            assert not vocabulary.controls & set(outcome.token_ids)
            if outcome.finish_reason is FinishReason.STOP:
                ended += 1
                jsonschema_rs.validate(schema, json.loads(vocabulary.spell(outcome.token_ids)))
            else:
                assert len(outcome.token_ids) == 200, name
    assert ended > 2 * len(SCHEMAS)


async def a_grammar_of_marked_json_holds(engine: Engine, subject: Subject) -> None:
    lark = 'start: call+\ncall: "<call>" %json {"enum": [1, 22]} "</call>"\n'
    request = constrained(subject, {}, 5, max_tokens=60, grammar=Grammar(f"%llguidance {{}}\n{lark}", Syntax.LARK))
    outcome = await gather(engine, request)
    text = read_vocabulary(_tokenizer(subject)).spell(outcome.token_ids)
    assert re.match(r"(<call>(1|22)</call>)+", text), text
    assert outcome.finish_reason is FinishReason.LENGTH or re.fullmatch(r"(<call>(1|22)</call>)+", text)


async def a_grammar_cut_short_ends_with_length(engine: Engine, subject: Subject) -> None:
    outcome = await gather(engine, constrained(subject, {"const": "a long text to cut"}, 0, max_tokens=3))
    assert outcome.finish_reason is FinishReason.LENGTH
    assert len(outcome.token_ids) == 3


async def a_grammar_touches_its_own_row_only(engine: Engine, subject: Subject) -> None:
    free = [ask(subject, variant, max_tokens=24, logprobs=2) for variant in (subject.base, *subject.adapters)]
    held = [constrained(subject, schema, 1) for schema in SCHEMAS.values()]
    alone = [await gather(engine, request) for request in (*free, *held)]
    together = await asyncio.gather(*(gather(engine, request) for request in (*free, *held)))
    assert [outcome.token_ids for outcome in together] == [outcome.token_ids for outcome in alone]


async def logprobs_ignore_the_grammar(engine: Engine, subject: Subject) -> None:
    drawn = await gather(engine, constrained(subject, SCHEMAS["flat"], 2, logprobs=2))
    assert_same_scores(drawn, await gather(engine, scoring(subject, drawn.token_ids)), subject)


GRAMMAR_CHECKS: tuple[Check, ...] = (  # for an engine that has Feature.GRAMMAR
    a_grammar_holds_at_temperature_1,
    a_grammar_of_marked_json_holds,
    a_grammar_cut_short_ends_with_length,
    a_grammar_touches_its_own_row_only,
    logprobs_ignore_the_grammar,
)

CHECKS: tuple[Check, ...] = (
    greedy_is_deterministic,
    max_tokens_is_exact,
    a_stop_token_ends_and_is_in_no_delta,
    a_stop_token_may_come_first,
    prompt_logprobs_cover_the_prompt,
    no_logprobs_unless_asked,
    logprobs_are_a_distribution,
    logprobs_ignore_temperature_and_penalties,
    scoring_agrees_with_generation,
    a_seed_reproduces,
    a_seed_reproduces_in_company,
    a_tiny_nucleus_is_greedy,
    penalties_avoid_repetition,
    a_bias_forces_and_forbids_tokens,
    leaving_frees_the_work,
    cancelling_frees_the_work,
    variants_in_one_batch_equal_each_alone,
    late_joiners_change_nothing,
    max_tokens_0_scores_the_prompt,
    a_full_context_ends_with_length,
    a_variant_can_leave_and_return,
    stats_move_with_the_work,
    stopping_ends_requests_with_engine_dead,
)
