"""What is drawn follows the distribution, the request's own settings and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from serving.engine.engine import GenerationRequest, Sampling, Variant, VariantKind
from serving.engine.sampler import NUCLEUS_TOKENS, sample, score
from serving.engine.scheduler import Row

BASE = Variant("base", VariantKind.BASE, "b", Path("base"))


def make_row(*, seed: int = 0, counts: dict[int, int] | None = None, logprobs: int | None = None, **sampling) -> Row:
    request = GenerationRequest("r", BASE, (1,), Sampling(max_tokens=9, **sampling), logprobs=logprobs)
    return Row(request, torch.Generator().manual_seed(seed), counts=Counter(counts or {}))


def draw(rows, logits) -> list[int]:
    return [drawn.token_id for drawn in sample(rows, torch.tensor(logits))]


def draw_often(times: int, logits: list[float], **sampling) -> Counter[int]:
    row = make_row(**sampling)
    return Counter(token for _ in range(times // 50) for token in draw([row] * 50, [logits] * 50))


def test_temperature_0_takes_the_likeliest():
    assert draw([make_row(temperature=0.0)] * 2, [[1.0, 3.0, 2.0], [5.0, 1.0, 2.0]]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    logits = [2.0, 1.0, 0.0, -1.0]
    seen = draw_often(4000, logits, temperature=temperature)
    expected = torch.softmax(torch.tensor(logits) / temperature, -1)
    for token, probability in enumerate(expected.tolist()):
        assert seen[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_a_tiny_temperature_is_greedy_and_finite():
    assert draw_often(100, [80.0, 79.0, -90.0], temperature=1e-30) == {0: 100}


def test_top_p_keeps_the_fewest_tokens_that_hold_it():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert set(draw_often(500, logits, top_p=0.69)) == {0, 1}
    assert set(draw_often(500, logits, top_p=0.71)) == {0, 1, 2}
    assert set(draw_often(500, logits, top_p=0.0)) == {0}
    seen = draw_often(4000, logits, top_p=0.69)
    assert seen[0] / 4000 == pytest.approx(4 / 7, abs=0.03), "what is kept is renormalised"


def test_a_wide_nucleus_is_sorted_whole():
    vocabulary = NUCLEUS_TOKENS * 4
    seen = draw_often(2000, [0.0] * vocabulary, top_p=0.9)
    assert NUCLEUS_TOKENS < len(seen) <= vocabulary * 0.9 + 1


def test_a_token_without_probability_is_never_drawn():
    assert set(draw_often(1000, [-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])) == {1, 3}


def test_a_seed_gives_the_same_draws_in_any_company():
    torch.manual_seed(0)
    logits = torch.randn(20, 50)
    alone = make_row(seed=7, temperature=1.3)
    expected = [sample([alone], row_logits[None])[0].token_id for row_logits in logits]
    together, others = make_row(seed=7, temperature=1.3), [make_row(top_p=0.5), make_row(temperature=0.0), make_row()]
    drawn = [
        sample([*others, together], torch.cat([torch.randn(3, 50), row_logits[None]]))[3].token_id
        for row_logits in logits
    ]
    assert drawn == expected
    assert len(set(expected)) > 3


def test_penalties_are_openais_over_generated_tokens():
    logits = [[3.0, 2.0, 1.0]]
    assert draw([make_row(temperature=0.0, presence_penalty=0.9, counts={0: 5})], logits) == [0]
    assert draw([make_row(temperature=0.0, presence_penalty=1.1, counts={0: 5})], logits) == [1]
    assert draw([make_row(temperature=0.0, frequency_penalty=0.19, counts={0: 5})], logits) == [0]
    assert draw([make_row(temperature=0.0, frequency_penalty=0.21, counts={0: 5})], logits) == [1]
    assert draw([make_row(temperature=0.0, frequency_penalty=-0.5, counts={2: 5})], logits) == [2]


def test_a_penalty_touches_its_own_row_only():
    rows = [make_row(temperature=0.0, presence_penalty=2.0, counts={0: 1}), make_row(temperature=0.0, counts={0: 1})]
    assert draw(rows, [[3.0, 2.0], [3.0, 2.0]]) == [1, 0]


def test_logprobs_are_of_the_raw_distribution():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    row = make_row(temperature=5.0, top_p=0.3, presence_penalty=2.0, counts={0: 1}, logprobs=2)
    logprob = sample([row], logits)[0].logprob
    expected = torch.log_softmax(logits[0], -1)
    assert logprob is not None
    assert logprob.logprob == pytest.approx(float(expected[logprob.token_id]))
    assert [token for token, _ in logprob.top] == [0, 1]
    assert [value for _, value in logprob.top] == pytest.approx(expected[:2].tolist())


def test_rows_report_the_logprobs_they_asked_for():
    rows = [make_row(logprobs=None), make_row(logprobs=0), make_row(logprobs=3)]
    drawn = sample(rows, torch.randn(3, 8))
    assert drawn[0].logprob is None
    assert [len(one.logprob.top) for one in drawn[1:]] == [0, 3]


def test_more_alternatives_than_tokens_are_all_tokens():
    assert len(score(torch.randn(1, 4), [2], [20])[0].top) == 4
