"""Distances are what their names say, computed another way; intervals hold their mean."""

from __future__ import annotations

import math

import pytest
import torch

from training import distance as module
from training.distance import Distance, distances
from training.reading import Reading

HEAD = torch.eye(3)


def reading(probabilities: list[list[float]]) -> Reading:
    hidden = torch.tensor(probabilities).log()
    count = len(probabilities)
    return Reading(hidden, torch.zeros(count, dtype=torch.int64), torch.arange(count) // 2)


LEFT = reading([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
RIGHT = reading([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]])


@pytest.mark.parametrize("chunk_bytes", [1, 2**24])
def test_kl_agreement_and_nll_follow_their_definitions(monkeypatch, chunk_bytes):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    same, found = distances(LEFT, [LEFT, RIGHT], HEAD)
    assert (same.kl_mean, same.kl_max, same.top1_agreement, same.nll_difference) == (0.0, 0.0, 1.0, 0.0)
    first = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.25)
    third = 0.3 * math.log(0.3 / 0.4) + 0.4 * math.log(0.4 / 0.3)
    assert found.kl_max == pytest.approx(first, rel=1e-5)
    assert found.kl_mean == pytest.approx((first + third) / 3, rel=1e-5)
    assert found.top1_agreement == pytest.approx(2 / 3)
    assert found.nll_difference == pytest.approx((math.log(0.7 / 0.5) + math.log(0.3 / 0.4)) / 3, rel=1e-5)


def of_differences(differences: torch.Tensor, rows: torch.Tensor) -> Distance:
    zeros = torch.zeros_like(differences)
    return Distance(zeros, zeros.bool(), zeros, differences, rows)


def test_the_interval_counts_rows_not_tokens():
    """Tokens of a row hang together: 400 tokens of 8 rows that differ are known no better than 8 numbers."""
    random = torch.Generator().manual_seed(3)
    by_row = torch.randn(8, generator=random, dtype=torch.float64)
    hanging = of_differences(by_row.repeat_interleave(50), torch.arange(8).repeat_interleave(50))
    low, high = hanging.nll_interval()
    assert low < hanging.nll_difference < high
    expected = 2 * 1.96 * by_row.std(correction=0).item() / math.sqrt(8)
    assert high - low == pytest.approx(expected, rel=0.2)
    assert hanging.nll_interval() == (low, high)


def test_a_prefix_ends_at_its_rows_first_disagreement():
    agree = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1]).bool()
    zeros = torch.zeros(8, dtype=torch.float64)
    found = Distance(zeros, agree, zeros, zeros, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]))
    assert found.agreeing_prefixes() == (2, 0, 2)
