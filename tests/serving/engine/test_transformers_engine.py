"""The engine gives what transformers and peft give, for every mixture of requests, and ends in order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from serving.engine.engine import GenerationRequest, Sampling, Variant, VariantKind, WeightFormat
from serving.engine.number_format import load_model
from serving.engine.transformers_engine import TransformersEngine
from serving.errors import AdapterRejected, BadRequest, ContextTooLong, EngineDead, ModelNotFound, ModelRejected
from tests.serving.engine.contract import CHECKS, GRAMMAR_CHECKS, Subject, ask, constrained, gather, run_check, until

PROMPT = tuple(range(40, 52))
TOKENS = 20


def make_merged(base: Path, adapter: Path, directory: Path) -> Path:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model.merge_and_unload().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def variants(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory) -> tuple[Variant, ...]:
    """Base, two adapters and the merge of the second."""
    merged = make_merged(tiny_base, tiny_adapters["other"], tmp_path_factory.mktemp("merged"))
    return (
        Variant("base", VariantKind.BASE, "b", tiny_base),
        Variant("starter", VariantKind.ADAPTER, "1", tiny_adapters["starter"]),
        Variant("other", VariantKind.ADAPTER, "2", tiny_adapters["other"]),
        Variant("merged", VariantKind.MERGED, "m", merged),
    )


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> tuple[Variant, Variant]:
    """A base with biases in its attention, and an adapter of two kinds of layers only."""
    base, adapter = tmp_path_factory.mktemp("qwen2"), tmp_path_factory.mktemp("qwen2-adapter")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(
        vocab_size=300, num_hidden_layers=2, max_position_embeddings=512, initializer_range=0.2, eos_token_id=1, **sizes
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(base)
    lora = LoraConfig(r=4, target_modules=["k_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(adapter)
    return Variant("base", VariantKind.BASE, "q", base), Variant("adapter", VariantKind.ADAPTER, "a", adapter)


def make_subject(variants: tuple[Variant, ...], **options) -> Subject:
    base = variants[0]
    return Subject(lambda: TransformersEngine(base.path, device="cpu", **options), base, variants[1:], PROMPT)


def run_with(variants: tuple[Variant, ...], check: Callable[..., Awaitable[None]], **options) -> None:
    run_check(check, make_subject(variants, **options))


def generate_with_transformers(base: Path, adapter: Path | None, prompt: tuple[int, ...]) -> tuple[int, ...]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
    return tuple(output[0, len(prompt) :].tolist())


@pytest.mark.parametrize("check", CHECKS + GRAMMAR_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check, variants):
    run_with(variants, check)


@pytest.mark.parametrize("weights", [WeightFormat.NF4, WeightFormat.FP16])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract_on_a_base_in_fewer_bits(check, weights, variants):
    run_with(variants, check, weights=weights)


@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_greedy_tokens_equal_transformers_and_peft(model, variants, qwen2):
    chosen = variants[:3] if model == "llama" else qwen2

    async def check(engine, about):
        prompts = [PROMPT, PROMPT[::-1] * 9, PROMPT[:1]]
        cases = [(variant, prompt) for variant in chosen for prompt in prompts]
        requests = [ask(about, variant, prompt_ids=prompt, max_tokens=TOKENS) for variant, prompt in cases]
        outcomes = await asyncio.gather(*(gather(engine, request) for request in requests))
        for (variant, prompt), outcome in zip(cases, outcomes, strict=True):
            adapter = variant.path if variant.kind is VariantKind.ADAPTER else None
            assert outcome.token_ids == generate_with_transformers(chosen[0].path, adapter, prompt), variant.name

    run_with(chosen, check)


@pytest.mark.parametrize(("weights", "tolerance"), [(WeightFormat.PLAIN, 1e-4), (WeightFormat.NF4, 1e-3)])
def test_scores_equal_pefts_on_the_same_base(weights, tolerance, variants, qwen2):
    """A base in NF4 is what training loads."""
    for base, adapter in ((variants[0], variants[1]), qwen2):

        async def check(engine, about, base=base, adapter=adapter):
            prompt = tuple(index * 17 % 250 for index in range(150))
            request = ask(about, adapter, prompt_ids=prompt, prompt_logprobs=0, max_tokens=0)
            outcome = await gather(engine, request)
            loaded = load_model(base.path, torch.device("cpu"), weights, torch.float32)
            model = PeftModel.from_pretrained(loaded, adapter.path)
            with torch.inference_mode():
                expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
            scores = torch.tensor([entry.logprob for entry in outcome.prompt_logprobs[1:]])
            assert torch.allclose(scores, expected[range(149), prompt[1:]], atol=tolerance)

        run_with((base, adapter), check, weights=weights)


@pytest.mark.parametrize("weights", WeightFormat)
def test_a_merged_model_is_plain_whatever_the_bases_format(weights, variants):
    async def check(engine, about):
        merged = await gather(engine, ask(about, variants[3], logprobs=0, max_tokens=TOKENS))
        assert merged.token_ids == generate_with_transformers(variants[3].path, None, PROMPT)

    run_with((variants[0], variants[3]), check, weights=weights)


def test_the_cost_of_fp16_is_known_once_it_has_loaded(variants, caplog):
    caplog.set_level("INFO", "graft.engine")

    async def check(engine, about):
        assert engine.weights_cost.tokens > 100
        assert 0 < engine.weights_cost.kl_nats < 1e-3
        assert f"base in fp16: 0.00 GiB; {engine.weights_cost}" in caplog.text

    run_with(variants[:1], check, weights=WeightFormat.FP16)
    assert TransformersEngine(variants[0].path, device="cpu").weights_cost is None


def test_fp16_is_refused_beside_a_gpu_before_anything_loads(variants):
    with pytest.raises(ModelRejected, match="fp16 is for CPUs"):
        TransformersEngine(variants[0].path, device="cuda", weights=WeightFormat.FP16)


def test_a_merged_model_answers_as_its_adapter(variants):
    async def check(engine, about):
        adapter, merged = [
            await gather(engine, ask(about, variant, logprobs=0, max_tokens=TOKENS)) for variant in variants[2:]
        ]
        assert merged.token_ids == adapter.token_ids
        for one, other in zip(merged.logprobs, adapter.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)

    run_with(variants, check)


def test_rows_that_join_and_leave_at_random_get_what_they_get_alone(variants):
    random = Random(5)

    def make_request(about: Subject) -> GenerationRequest:
        length = random.choice([1, 5, 30, 90])
        prompt = tuple(random.randrange(250) for _ in range(length))
        sampling = {"temperature": random.choice([0.0, 1.0]), "seed": random.randrange(99), "top_p": 0.9}
        return ask(about, random.choice(variants), prompt_ids=prompt, max_tokens=random.randrange(1, 40), **sampling)

    async def check(engine, about):
        requests = [make_request(about) for _ in range(24)]
        alone = [(await gather(engine, request)).token_ids for request in requests]

        async def join_late(request: GenerationRequest, steps: int, leaves: bool) -> tuple[int, ...] | None:
            start = engine.stats().steps
            await until(lambda: engine.stats().steps >= start + steps)
            if not leaves:
                return (await gather(engine, request)).token_ids
            async with aclosing(engine.generate(request)) as deltas:
                await anext(deltas)
            return None

        keeper = asyncio.create_task(gather(engine, ask(about, max_tokens=400)))
        crowd = [join_late(request, random.randrange(15), index % 4 == 3) for index, request in enumerate(requests)]
        outcomes = await asyncio.gather(*crowd)
        keeper.cancel()
        stayed = [(one, other) for one, other in zip(outcomes, alone, strict=True) if one is not None]
        assert len(stayed) == 18
        assert [one for one, _ in stayed] == [other for _, other in stayed]

    run_with(variants, check, max_batch=5)


def test_a_closed_stream_gives_its_slot_to_the_next_within_a_step(variants):
    async def check(engine, about):
        stream = engine.generate(ask(about, max_tokens=400))
        await anext(stream)
        waiting = asyncio.create_task(gather(engine, ask(about, max_tokens=1)))
        await until(lambda: engine.stats().waiting == 1)
        await stream.aclose()
        steps = engine.stats().steps
        await waiting
        assert engine.stats().steps <= steps + 3, "the step that ran, the prompt's own, and one of slack"

    run_with(variants[:1], check, max_batch=1)


def test_a_step_that_fails_ends_every_request_with_engine_dead(variants, monkeypatch):
    async def check(engine, about):
        tasks = [asyncio.create_task(gather(engine, ask(about, max_tokens=400))) for _ in range(3)]
        await until(lambda: engine.stats().running == 2)

        def fail(batch):
            raise MemoryError("no memory left")

        monkeypatch.setattr(engine._stepper.base, "forward", fail)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineDead] * 3
        assert "no memory left" in str(outcomes[0])
        assert not engine.healthy()
        with pytest.raises(EngineDead, match="no memory left"):
            await gather(engine, ask(about))
        with pytest.raises(EngineDead):
            await engine.add(variants[1])

    run_with(variants[:1], check, max_batch=2)


@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        ({"prompt_ids": ()}, BadRequest, "no tokens"),
        ({"prompt_ids": (1, 10**6)}, BadRequest, "1000000"),
        ({"prompt_ids": (1, -1)}, BadRequest, "-1"),
        ({"max_tokens": -1}, BadRequest, "max_tokens -1"),
        ({"prompt_ids": (5,) * 512}, ContextTooLong, "512"),
    ],
)
def test_what_would_fail_inside_a_step_is_refused_before(variants, fields, error, reason):
    async def check(engine, about):
        with pytest.raises(error, match=reason):
            await gather(engine, ask(about, **fields))
        whole = await gather(engine, ask(about, prompt_ids=(5,) * 512, max_tokens=0, prompt_logprobs=0))
        assert len(whole.prompt_logprobs) == 512

    run_with(variants[:1], check)


def test_a_grammar_that_cannot_be_followed_ends_its_own_request_only(variants):
    async def check(engine, about):
        beside = asyncio.create_task(gather(engine, ask(about, max_tokens=60)))
        with pytest.raises(BadRequest, match="NoExtension"):
            await gather(engine, constrained(about, {"$ref": "#"}, 0))
        with pytest.raises(BadRequest, match="Unimplemented"):
            await gather(engine, constrained(about, {"not": {}}, 0))
        assert len((await beside).token_ids) == 60
        await until(lambda: engine.stats().running + engine.stats().waiting == 0)

    run_with(variants[:1], check)


def test_an_engine_that_ends_while_a_grammar_compiles_ends_its_request(variants):
    async def check(engine, about):
        begun, go, finish = threading.Event(), threading.Event(), engine._grammars.compile

        def compile_slowly(*arguments):
            begun.set()
            assert go.wait(20)
            return finish(*arguments)

        engine._grammars.compile = compile_slowly
        asking = asyncio.create_task(gather(engine, constrained(about, {"const": 1}, 0)))
        await until(begun.is_set)
        await engine.stop()
        go.set()
        with pytest.raises(EngineDead, match="stopped"):
            await asyncio.wait_for(asking, 20)

    run_with(variants[:1], check)


def test_a_preempted_row_goes_on_in_its_grammar(variants):
    row = 512 * 2 * 2 * 2 * 16 * 4
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 90, "maxItems": 90}

    async def check(engine, about):
        requests = [constrained(about, schema, seed, max_tokens=400) for seed in range(3)]
        return [outcome.token_ids for outcome in await asyncio.gather(*(gather(engine, each) for each in requests))]

    results = []

    async def keep(engine, about):
        results.append(await check(engine, about))

    run_with(variants[:1], keep)
    run_with(variants[:1], keep, cache_bytes=row)
    assert results[0] == results[1]


def test_a_variant_that_is_not_loaded_is_not_answered(variants):
    async def check(engine, about):
        with pytest.raises(ModelNotFound, match="'other' is not loaded"):
            await gather(engine, ask(about, variants[2]))
        await engine.remove(variants[1])
        with pytest.raises(ModelNotFound, match="'starter' is not loaded"):
            await gather(engine, ask(about, variants[1]))

    run_with(variants[:2], check)


def test_an_adapter_or_merged_model_of_another_base_is_refused_and_the_engine_lives_on(variants, qwen2):
    async def check(engine, about):
        with pytest.raises(AdapterRejected):
            await engine.add(replace(qwen2[1], path=qwen2[0].path))
        with pytest.raises(ModelRejected, match="merge an adapter of this base"):
            await engine.add(replace(qwen2[0], kind=VariantKind.MERGED))
        with pytest.raises(ModelRejected):
            await engine.add(Variant("none", VariantKind.MERGED, "n", variants[1].path / "missing"))
        assert engine.healthy()
        assert len((await gather(engine, ask(about))).token_ids) == 8

    run_with(variants[:1], check)


def test_a_merged_model_that_leaves_no_room_for_a_row_is_refused_and_the_engine_lives_on(variants, monkeypatch):
    row = 512 * 2 * 2 * 2 * 16 * 4  # bytes: context, keys and values, layers, heads, their dimension, float32
    weights = AutoModelForCausalLM.from_pretrained(variants[3].path).get_memory_footprint()

    async def check(engine, about):
        if budget < row + weights:
            with pytest.raises(ModelRejected, match=r"'merged': .* lower --context-length"):
                await engine.add(variants[3])
        else:
            await engine.add(variants[3])
            assert len((await gather(engine, ask(about, variants[3]))).token_ids) == 8
        assert len((await gather(engine, ask(about))).token_ids) == 8

    for budget in (row + weights - 1, row + weights):
        monkeypatch.setattr("serving.engine.transformers_engine.cache_budget", lambda *_, budget=budget: budget)
        run_with(variants[:1], check)


def test_a_cache_of_a_given_size_runs_more_requests_than_it_holds(variants):
    row = 512 * 2 * 2 * 2 * 16 * 4

    async def check(engine, about):
        await engine.add(variants[3])  # the size was given, so nothing is taken from it
        requests = [ask(about, variant, max_tokens=200) for variant in (variants[0], variants[3]) for _ in range(2)]
        outcomes = await asyncio.gather(*(gather(engine, request) for request in requests))
        assert [len(outcome.token_ids) for outcome in outcomes] == [200] * 4
        assert outcomes[0] == outcomes[1]

    run_with(variants[:1], check, cache_bytes=row)
    with pytest.raises(ValueError, match="or raise --cache-gib"):
        run_with(variants[:1], check, cache_bytes=row - 1)


def test_it_starts_again_after_a_stop(variants):
    async def scenario():
        engine = TransformersEngine(variants[0].path, device="cpu")
        request = GenerationRequest("r", variants[0], PROMPT, Sampling(max_tokens=4, temperature=0.0))
        with pytest.raises(EngineDead, match="not started"):
            await gather(engine, request)
        seen = []
        for _ in range(2):
            await engine.start()
            seen.append(await gather(engine, request))
            await engine.stop()
        assert seen[0] == seen[1]
        await engine.stop()

    asyncio.run(scenario())


def test_impossible_options_are_refused(variants):
    with pytest.raises(ValueError, match="max_batch 0"):
        TransformersEngine(variants[0].path, max_batch=0)
    with pytest.raises(ValueError, match="allows 1 to 512"):
        TransformersEngine(variants[0].path, context_length=513)
    assert TransformersEngine(variants[0].path, context_length=100).context_length == 100
