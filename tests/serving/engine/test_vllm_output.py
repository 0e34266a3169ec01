"""What vLLM hands out becomes the deltas that every engine gives."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from serving.engine.engine import Delta, FinishReason, GenerationRequest, Sampling, TokenLogprob, Variant, VariantKind
from serving.engine.vllm_output import UNLIKELY_NATS, StepMeter, delta, nothing_to_score, score
from serving.errors import EngineDead

PROMPT = (4, 5, 6)


def request_of(logprobs: int | None = None, prompt_logprobs: int | None = None) -> GenerationRequest:
    base = Variant("base", VariantKind.BASE, "b", Path("base"))
    return GenerationRequest("r", base, PROMPT, Sampling(max_tokens=4), logprobs, prompt_logprobs)


def ranked(*entries: tuple[int, float, int]) -> dict[int, SimpleNamespace]:
    """One position as vLLM gives it: token id -> log-probability and rank, the chosen token first."""
    return {token_id: SimpleNamespace(logprob=logprob, rank=rank) for token_id, logprob, rank in entries}


def output_of(token_ids, finish_reason=None, logprobs=None, prompt_logprobs=None) -> SimpleNamespace:
    completion = SimpleNamespace(token_ids=token_ids, finish_reason=finish_reason, logprobs=logprobs)
    metrics = SimpleNamespace(queued_ts=7.0, scheduled_ts=7.25)
    return SimpleNamespace(outputs=[completion], prompt_logprobs=prompt_logprobs, metrics=metrics)


def test_tokens_and_the_length_pass_through():
    assert delta(request_of(), output_of([7, 8]), first=False) == Delta((7, 8))
    assert delta(request_of(), output_of([9], "length"), first=False) == Delta((9,), finish_reason=FinishReason.LENGTH)


def test_the_first_delta_says_how_long_vllm_kept_the_request_waiting():
    assert delta(request_of(), output_of([7]), first=True).waited_s == 0.25
    scored = output_of([6], "length", [ranked((6, -0.7, 1))], [None, ranked((5, -2.0, 3))])
    assert score(request_of(prompt_logprobs=0), scored).waited_s == 0.25


def test_steps_are_counted_with_what_each_left_waiting():
    meter = StepMeter()
    meter.record(SimpleNamespace(num_waiting_reqs=3), None, engine_idx=0)
    meter.record(None, SimpleNamespace())  # an output without a step
    assert (meter.steps, meter.waiting) == (1, 3)


def test_the_stop_token_is_dropped_with_its_logprob():
    positions = [ranked((7, -0.5, 1)), ranked((2, -0.1, 1))]
    found = delta(request_of(logprobs=0), output_of([7, 2], "stop", positions), first=False)
    assert found == Delta((7,), (TokenLogprob(7, -0.5),), finish_reason=FinishReason.STOP)


def test_alternatives_are_the_likeliest_best_first_without_the_drawn_token_where_it_is_none_of_them():
    positions = [ranked((7, -3.0, 9), (1, -0.4, 1), (2, -1.2, 2)), ranked((2, -1.2, 2), (1, -0.4, 1))]
    found = delta(request_of(logprobs=2), output_of([7, 2], None, positions), first=True)
    assert found.logprobs == (
        TokenLogprob(7, -3.0, ((1, -0.4), (2, -1.2))),
        TokenLogprob(2, -1.2, ((1, -0.4), (2, -1.2))),
    )


def test_the_first_prompt_token_has_no_logprob():
    prompt = [None, ranked((5, -2.0, 3)), ranked((6, -0.7, 1))]
    found = delta(request_of(prompt_logprobs=0), output_of([7], None, None, prompt), first=True)
    assert found.prompt_logprobs == (None, TokenLogprob(5, -2.0), TokenLogprob(6, -0.7))
    assert delta(request_of(prompt_logprobs=0), output_of([7], None, None, []), first=False).prompt_logprobs is None


def test_a_score_ends_with_the_token_that_was_generated():
    output = output_of([6], "length", [ranked((6, -0.7, 1))], [None, ranked((5, -2.0, 3), (1, -0.1, 1))])
    found = score(request_of(prompt_logprobs=1), output)
    assert found.token_ids == ()
    assert found.finish_reason is FinishReason.LENGTH
    assert found.prompt_logprobs == (None, TokenLogprob(5, -2.0, ((1, -0.1),)), TokenLogprob(6, -0.7, ((6, -0.7),)))


def test_a_score_of_a_prompt_that_lacks_a_position_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        score(request_of(prompt_logprobs=0), output_of([6], "length", [ranked((6, -0.7, 1))], [None]))


def test_a_prompt_without_a_predicted_token_is_answered_at_once():
    assert nothing_to_score(request_of(prompt_logprobs=3)).prompt_logprobs == (None,)
    assert nothing_to_score(request_of()) == Delta(finish_reason=FinishReason.LENGTH)


def test_probability_0_is_a_number():
    found = delta(request_of(logprobs=0), output_of([7], None, [ranked((7, -math.inf, 400))]), first=True)
    assert found.logprobs[0].logprob == UNLIKELY_NATS


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_vllm_gave_up_ends_with_engine_dead(reason):
    with pytest.raises(EngineDead, match=reason):
        delta(request_of(), output_of([], reason), first=False)
