"""A step moves every row by what the plan says, whatever shares the batch and the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from serving.engine.engine import Delta, FinishReason, GenerationRequest, Sampling, Variant, VariantKind
from serving.engine.kv_cache import KvCache
from serving.engine.scheduler import Row, Scheduler
from serving.engine.step import Stepper
from serving.engine.threads import StepThreads
from serving.engine.weights import WeightSet, load_weights
from serving.errors import ModelRejected

CONTEXT = 512
PROMPTS = tuple(tuple((7 * row + 3 * at) % 250 for at in range(60 + 20 * row)) for row in range(4))


@pytest.fixture(scope="module")
def weights(tiny_base: Path) -> WeightSet:
    return load_weights(tiny_base, CONTEXT, torch.device("cpu"))


def make_stepper(weights: WeightSet, *, chunk_tokens: int = 64, budget_tokens: int = 100_000) -> Stepper:
    budget = budget_tokens * weights.shape.token_bytes(weights.dtype)
    cache = KvCache(weights.shape, weights.dtype, weights.device, 8, CONTEXT, budget)
    threads = StepThreads(0, torch.get_num_threads())
    return Stepper(weights, cache, Scheduler(cache, max_rows=8, chunk_tokens=chunk_tokens), threads)


def make_row(prompt: tuple[int, ...], max_tokens: int, base: Path = Path(), prompt_logprobs: int | None = None) -> Row:
    variant = Variant("base", VariantKind.BASE, "b", base)
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
    return Row(GenerationRequest("r", variant, prompt, sampling, prompt_logprobs=prompt_logprobs), torch.Generator())


@torch.inference_mode()
def run(stepper: Stepper, rows: list[Row]) -> tuple[dict[Row, list[Delta]], int]:
    """Steps until all rows have finished; returns their deltas, and how often a row was preempted."""
    deltas: dict[Row, list[Delta]] = {row: [] for row in rows}
    preempted = 0
    for row in rows:
        stepper.scheduler.add(row)
    while stepper.busy:
        active = set(stepper.scheduler.active)
        done = stepper.step()
        for row, delta in done:
            deltas[row].append(delta)
        preempted += len(active & set(stepper.scheduler.waiting))
    return deltas, preempted


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_chunks_of_any_size_give_the_same_tokens(weights):
    expected = None
    for chunk_tokens in (1, 7, 64, 512):
        rows = [make_row(prompt, 12) for prompt in PROMPTS]
        deltas, _ = run(make_stepper(weights, chunk_tokens=chunk_tokens), rows)
        tokens = [tokens_of(deltas[row]) for row in rows]
        expected = expected or tokens
        assert tokens == expected


def test_preempted_rows_give_the_same_tokens(weights):
    wide, narrow = [make_row(prompt, 150) for prompt in PROMPTS], [make_row(prompt, 150) for prompt in PROMPTS]
    expected, none = run(make_stepper(weights), wide)
    deltas, preempted = run(make_stepper(weights, budget_tokens=CONTEXT), narrow)
    assert none == 0
    assert preempted > 0
    assert [tokens_of(deltas[row]) for row in narrow] == [tokens_of(expected[row]) for row in wide]


@pytest.mark.parametrize("chunk_tokens", [5, 300])
def test_prompt_scores_equal_transformers(weights, tiny_base, chunk_tokens):
    prompt = tuple(index * 31 % 250 for index in range(200))
    row, other = make_row(prompt, 3, prompt_logprobs=4), make_row(PROMPTS[0], 5)
    deltas, _ = run(make_stepper(weights, chunk_tokens=chunk_tokens), [other, row])
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
    scores = deltas[row][0].prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert len(scores) == len(prompt)
    for position, entry in enumerate(scores[1:]):
        assert entry is not None
        assert entry.token_id == prompt[position + 1]
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        assert entry.top[0][1] == pytest.approx(float(expected[position].max()), abs=1e-4)
    assert all(delta.prompt_logprobs is None for delta in deltas[row][1:])
    assert deltas[other][0].prompt_logprobs is None


def test_rows_that_finish_leave_in_the_same_step(weights):
    stepper = make_stepper(weights)
    rows = [make_row(PROMPTS[0][:5], count) for count in (1, 2, 3)]
    for row in rows:
        stepper.scheduler.add(row)
    with torch.inference_mode():
        for left in (2, 1, 0):
            done = stepper.step()
            assert len(stepper.scheduler.active) == left
            assert [delta.finish_reason for _, delta in done].count(FinishReason.LENGTH) == 1
    assert not stepper.busy


def test_a_variant_in_use_cannot_be_removed(weights):
    stepper = make_stepper(weights)
    row = make_row(PROMPTS[0], 5)
    stepper.scheduler.add(row)
    with pytest.raises(RuntimeError, match="still answers 1 requests"):
        stepper.remove(row.request.variant)


def test_a_merged_model_is_paid_for_from_the_cache_and_gives_it_back(weights, tiny_base):
    stepper = make_stepper(weights, budget_tokens=CONTEXT + 10)
    token_bytes = weights.shape.token_bytes(weights.dtype)
    first, second = [Variant(name, VariantKind.MERGED, name, tiny_base) for name in ("m", "n")]
    stepper.add_merged(first, weights, 10 * token_bytes)
    with pytest.raises(ModelRejected, match=f"'n': .* no row of context_length {CONTEXT}: lower --context-length"):
        stepper.add_merged(second, weights, 1)
    assert not stepper.knows(second)
    stepper.remove(first)
    stepper.add_merged(second, weights, 10 * token_bytes)
    assert stepper.knows(second)


def test_the_first_delta_alone_says_how_long_a_row_waited(weights):
    rows = [make_row(PROMPTS[0], 3) for _ in range(9)]  # one more than run at once
    deltas, _ = run(make_stepper(weights), rows)
    waits = [[delta.waited_s for delta in deltas[row]] for row in rows]
    assert all(first is not None and rest == [None, None] for first, *rest in waits)
    assert waits[-1][0] > max(wait[0] for wait in waits[:-1]) > 0
