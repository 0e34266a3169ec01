"""The real vLLM keeps the contract, says what the transformers engine says, and ends in order.

One engine serves most tests: a start takes vLLM tens of seconds.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from serving.engine.engine import Engine, GenerationRequest, Sampling, Variant, VariantKind
from serving.engine.transformers_engine import TransformersEngine
from serving.errors import (
    AdapterRejected,
    BadRequest,
    ContextTooLong,
    EngineDead,
    ModelNotFound,
    ModelRejected,
    UnsupportedField,
)
from tests.serving.engine.contract import (
    CHECKS,
    GRAMMAR_CHECKS,
    Outcome,
    Subject,
    ask,
    constrained,
    gather,
    logprobs_ignore_the_grammar,
    stopping_ends_requests_with_engine_dead,
    until,
)
from tests.serving.engine.on_vllm import NEEDS_VLLM, make_engine, make_wide_model, vllm_environment
from tests.tiny import make_tiny_adapter
from training.embedded import ensure_embedded

ROOT = Path(__file__).resolve().parents[3]
PROMPT = tuple(range(40, 52))
PROMPTS = [PROMPT, PROMPT[::-1] * 9, PROMPT[:1], *(tuple(range(start, start + 30)) for start in range(3, 303, 60))]
# Both compute in fp32, but in kernels that add in another order: logits differ by up to 1e-4, and a tie may fall
# either way. So tokens are equal up to the first position whose two best are closer than this.
TIE_NATS = 1e-3
Runner = asyncio.Runner


def needs(test: Callable[..., None]) -> Callable[..., None]:
    for mark in NEEDS_VLLM:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    with vllm_environment():
        yield


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory) -> Path:
    return make_wide_model(tmp_path_factory.mktemp("wide") / "base")


@pytest.fixture(scope="module")
def variants(wide_base: Path, tmp_path_factory) -> tuple[Variant, ...]:
    root = tmp_path_factory.mktemp("adapters")
    adapters = [(name, make_tiny_adapter(wide_base, root / name, name, seed)) for name, seed in (("a", 1), ("c", 2))]
    return (
        Variant("base", VariantKind.BASE, "b", wide_base),
        *(Variant(name, VariantKind.ADAPTER, f"d{name}", path) for name, path in adapters),
    )


@pytest.fixture(scope="module")
def subject(variants: tuple[Variant, ...], environment: None) -> Subject:
    return Subject(lambda: make_engine(variants[0].path), variants[0], variants[1:], PROMPT)


@pytest.fixture(scope="module")
def shared(subject: Subject) -> Iterator[tuple[Runner, Engine]]:
    """A started engine with all variants, and the loop that it lives in."""
    engine = subject.make()
    with Runner() as runner:
        runner.run(engine.start())
        try:
            for variant in (subject.base, *subject.adapters):
                runner.run(engine.add(variant))
            yield runner, engine
        finally:
            runner.run(engine.stop())


def run_shared(shared: tuple[Runner, Engine], work: Awaitable[None]) -> None:
    async def within() -> None:
        await asyncio.wait_for(work, timeout=120)

    shared[0].run(within())


@needs
@pytest.mark.parametrize(
    "check",
    [
        check
        for check in CHECKS + GRAMMAR_CHECKS
        if check not in (stopping_ends_requests_with_engine_dead, logprobs_ignore_the_grammar)
    ],
    ids=lambda check: check.__name__,
)
def test_it_keeps_the_contract(check, shared, subject):
    run_shared(shared, check(shared[1], subject))


async def answer(engine: Engine, requests: list[GenerationRequest]) -> list[Outcome]:
    return list(await asyncio.gather(*(gather(engine, request) for request in requests)))


def answers_of_transformers(variants: tuple[Variant, ...], requests: list[GenerationRequest], **options):
    async def run() -> list[Outcome]:
        engine = TransformersEngine(variants[0].path, device="cpu", **options)
        await engine.start()
        try:
            for variant in variants:
                await engine.add(variant)
            return await answer(engine, requests)
        finally:
            await engine.stop()

    return asyncio.run(run())


def assert_same_up_to_a_tie(found: Outcome, expected: Outcome) -> int:
    """Returns how many tokens were compared; log-probabilities have to agree as long as the tokens do."""
    compared = 0
    for one, other in zip(found.logprobs, expected.logprobs, strict=False):
        if one.token_id != other.token_id:
            best, second = (logprob for _, logprob in other.top)
            assert best - second < TIE_NATS, f"{one} is not {other}"
            break
        assert one.logprob == pytest.approx(other.logprob, abs=TIE_NATS)
        compared += 1
    return compared


@needs
def test_greedy_tokens_and_scores_are_those_of_the_transformers_engine(shared, subject, variants):
    greedy = [ask(subject, v, prompt_ids=ids, max_tokens=24, logprobs=2) for v in variants for ids in PROMPTS]
    scoring = [ask(subject, v, prompt_ids=ids, max_tokens=0, prompt_logprobs=0) for v in variants for ids in PROMPTS]
    expected = answers_of_transformers(variants, greedy + scoring)

    async def check() -> None:
        found = await answer(shared[1], greedy + scoring)
        pairs = list(zip(found, expected, strict=True))
        compared = sum(assert_same_up_to_a_tie(*pair) for pair in pairs[: len(greedy)])
        assert compared > 0.9 * 24 * len(greedy), "ties are rare"
        for one, other in pairs[len(greedy) :]:
            scores = [[entry.logprob for entry in outcome.prompt_logprobs[1:]] for outcome in (one, other)]
            assert scores[0] == pytest.approx(scores[1], abs=TIE_NATS)

    run_shared(shared, check())


@needs
def test_greedy_tokens_of_a_real_model_are_those_of_the_transformers_engine(environment):
    directory = ensure_embedded("embedded:smollm2-135m-instruct", ROOT / ".cache/graft")
    base = Variant("base", VariantKind.BASE, "b", directory)
    sampling = Sampling(max_tokens=16, temperature=0.0)
    requests = [GenerationRequest(f"r{start}", base, tuple(range(start, start + 20)), sampling, logprobs=2)
                for start in (500, 5000, 15000, 30000)]  # fmt: skip
    expected = answers_of_transformers((base,), requests, context_length=256, max_batch=4)

    async def check() -> None:
        engine = make_engine(directory, max_batch=4, context_length=256, max_adapters=1)
        await engine.start()
        try:
            found = await answer(engine, requests)
        finally:
            await engine.stop()
        assert sum(map(assert_same_up_to_a_tie, found, expected)) > 0.8 * 16 * len(requests)

    asyncio.run(check())


@needs
def test_a_prompt_that_fills_the_context_is_scored_and_a_single_token_too(shared, subject):
    async def check() -> None:
        whole = await gather(shared[1], ask(subject, prompt_ids=(5, 6) * 256, max_tokens=0, prompt_logprobs=2))
        assert len(whole.prompt_logprobs) == 512
        assert [len(entry.top) for entry in whole.prompt_logprobs[1:]] == [2] * 511
        single = await gather(shared[1], ask(subject, prompt_ids=(5,), max_tokens=0, prompt_logprobs=2))
        assert single.prompt_logprobs == (None,)

    run_shared(shared, check())


@needs
@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        ({"prompt_ids": ()}, BadRequest, "no tokens"),
        ({"prompt_ids": (1, 10**6)}, BadRequest, "1000000"),
        ({"max_tokens": -1}, BadRequest, "max_tokens -1"),
        ({"prompt_ids": (5,) * 512}, ContextTooLong, "512"),
    ],
)
def test_what_vllm_cannot_run_is_refused_before(shared, subject, fields, error, reason):
    async def check() -> None:
        with pytest.raises(error, match=reason):
            await gather(shared[1], ask(subject, **fields))

    run_shared(shared, check())


@needs
def test_logprobs_beside_a_grammar_are_refused_as_vllms_are_not_the_models_own(shared, subject):
    async def check() -> None:
        with pytest.raises(UnsupportedField, match="ask for one of the two") as caught:
            await gather(shared[1], constrained(subject, {"const": 1}, 0, logprobs=0))
        assert caught.value.param == "logprobs"

    run_shared(shared, check())


@needs
def test_a_negative_seed_is_a_seed(shared, subject):
    async def check() -> None:
        outcomes = [await gather(shared[1], ask(subject, temperature=1.5, seed=-1, max_tokens=16)) for _ in range(2)]
        assert outcomes[0] == outcomes[1]

    run_shared(shared, check())


@needs
def test_an_adapter_that_takes_anothers_name_answers_with_its_own_weights(shared, subject, wide_base, tmp_path):
    old, other = subject.adapters
    directory = make_tiny_adapter(wide_base, tmp_path / "new", "new", 3)

    async def check() -> None:
        engine = shared[1]
        new = replace(old, digest="dnew", path=directory)
        seen = []
        for variant in (old, new, old):
            await engine.remove(old if variant is new else new)
            await engine.add(variant)
            seen.append(await gather(engine, ask(subject, variant, logprobs=0)))
            assert len(await engine._llm.list_loras()) == 2, "what was removed is gone from vLLM's process too"
        assert seen[0] == seen[2] != seen[1]
        with pytest.raises(ModelNotFound, match="not loaded"):
            await gather(engine, ask(subject, replace(new, digest="dnever")))
        assert len((await gather(engine, ask(subject, other))).token_ids) == 8

    run_shared(shared, check())


@needs
def test_what_vllm_would_load_wrongly_is_refused_and_the_engine_lives_on(shared, subject, wide_base, tmp_path):
    wide = make_tiny_adapter(wide_base, tmp_path / "wide", "wide", 1)
    change_config(wide, rank_pattern={"q_proj": 4})
    foreign = tmp_path / "foreign"
    shutil.copytree(subject.adapters[0].path, foreign)
    (foreign / "adapter_model.safetensors").write_bytes(b"no tensors")

    async def check() -> None:
        engine = shared[1]
        adapter = subject.adapters[0]
        for path, reason in (
            (wide, "rank_pattern"),
            (foreign, "cannot be read"),
            (tmp_path / "none", "cannot be read"),
        ):
            with pytest.raises(AdapterRejected, match=reason):
                await engine.add(replace(adapter, digest=path.name, path=path))
        with pytest.raises(ModelRejected, match="--base of a server of its own"):
            await engine.add(replace(subject.base, kind=VariantKind.MERGED))
        assert engine.healthy()
        assert len((await gather(engine, ask(subject))).token_ids) == 8

    run_shared(shared, check())


def change_config(adapter: Path, **fields) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@needs
def test_a_closed_stream_gives_its_row_to_the_next_which_tells_how_long_it_waited(shared, subject):
    async def check() -> None:
        engine = shared[1]
        async with AsyncExitStack() as stack:
            streams = [engine.generate(ask(subject, max_tokens=400)) for _ in range(8)]
            for stream in streams:
                await stack.enter_async_context(aclosing(stream))
                await anext(stream)
            late = await stack.enter_async_context(aclosing(engine.generate(ask(subject, max_tokens=1))))
            waiting = asyncio.create_task(anext(late))
            await until(lambda: engine.stats().waiting == 1)
            await streams[0].aclose()
            steps = engine.stats().steps
            assert (await waiting).waited_s > 0
            assert engine.stats().steps < steps + 100, "long before another row came free by itself"

    run_shared(shared, check())


@needs
def test_stopping_ends_requests_with_engine_dead(shared, subject):
    """The last on the shared engine."""
    run_shared(shared, stopping_ends_requests_with_engine_dead(shared[1], subject))


def test_sizes_that_cannot_run_are_refused(tiny_base):
    with pytest.raises(ValueError, match="max_batch 0"):
        make_engine(tiny_base, max_batch=0)
    with pytest.raises(ValueError, match="allows 1 to 512"):
        make_engine(tiny_base, context_length=513)
    assert make_engine(tiny_base).context_length == 512


def test_an_engine_that_has_not_started_is_dead(tiny_base, variants):
    engine = make_engine(tiny_base)
    assert not engine.healthy()
    with pytest.raises(EngineDead, match="not started"):
        asyncio.run(engine.add(variants[0]))
