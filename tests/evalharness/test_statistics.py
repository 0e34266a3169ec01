from __future__ import annotations

import math

import numpy as np
import pytest

from evalharness.statistics import Bootstrap, estimate, mean, paired_difference, perplexity

BOOTSTRAP = Bootstrap(resamples=1000, seed=0)


def scores(values) -> np.ndarray:
    return np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)


def test_corpus_perplexity_is_of_all_tokens_not_of_rows():
    logprobs = [[-1.0, -2.0, -3.0], [-0.5]]
    stats = np.array([[-sum(row), len(row)] for row in logprobs])
    found = estimate(stats, perplexity, BOOTSTRAP)
    assert found.value == pytest.approx(math.exp(6.5 / 4))
    assert found.value != pytest.approx((math.exp(2.0) + math.exp(0.5)) / 2)


def test_nothing_scored_is_none_never_zero():
    found = estimate(scores([]), mean, BOOTSTRAP)
    assert (found.value, found.interval, found.count) == (None, None, 0)
    difference = paired_difference(scores([]), scores([]), mean, BOOTSTRAP)
    assert (difference.value, difference.change_percent, difference.pairs) == (None, None, 0)


def test_one_sample_has_a_value_and_no_interval():
    assert estimate(scores([3.0]), mean, BOOTSTRAP).interval is None
    difference = paired_difference(scores([2.0]), scores([3.0]), mean, BOOTSTRAP)
    assert (difference.value, difference.interval, difference.change_percent) == (1.0, None, 50.0)


def test_the_interval_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(1).normal(50, 10, size=200)
    found = estimate(scores(values), mean, Bootstrap(4000, 0))
    half = 1.96 * values.std() / math.sqrt(200)
    assert found.interval is not None
    assert found.interval.high - found.interval.low == pytest.approx(2 * half, rel=0.08)
    assert found.interval.low < found.value < found.interval.high


def test_a_planted_lift_excludes_zero_though_the_arms_overlap():
    generator = np.random.default_rng(2)
    base = generator.normal(30, 15, size=100)
    lifted = base + generator.normal(2, 3, size=100)
    alone = estimate(scores(base), mean, BOOTSTRAP), estimate(scores(lifted), mean, BOOTSTRAP)
    assert alone[0].interval.high > alone[1].interval.low
    found = paired_difference(scores(base), scores(lifted), mean, BOOTSTRAP)
    assert found.interval.excludes_zero
    assert found.interval.low > 0


def test_no_lift_includes_zero():
    base = np.random.default_rng(3).normal(30, 15, size=100)
    noise = np.tile([4.0, -4.0], 50)
    found = paired_difference(scores(base), scores(base + noise), mean, BOOTSTRAP)
    assert found.value == pytest.approx(0)
    assert not found.interval.excludes_zero


def test_an_arm_against_itself_differs_by_exactly_zero():
    base = scores(np.random.default_rng(4).normal(30, 15, size=50))
    found = paired_difference(base, base, mean, BOOTSTRAP)
    assert (found.value, found.interval.low, found.interval.high, found.change_percent) == (0, 0, 0, 0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(200):
        found = estimate(scores(generator.normal(7, 2, size=60)), mean, Bootstrap(300, seed))
        covered += found.interval.low <= 7 <= found.interval.high
    assert 0.90 <= covered / 200 <= 0.985


def test_a_seed_repeats_and_chunks_do_not_matter(monkeypatch):
    stats = scores(np.random.default_rng(6).normal(size=40))
    whole = estimate(stats, mean, BOOTSTRAP)
    assert estimate(stats, mean, BOOTSTRAP) == whole
    monkeypatch.setattr("evalharness.statistics.CHUNK_CELLS", 130)
    assert estimate(stats, mean, BOOTSTRAP).interval.low == pytest.approx(whole.interval.low)
    assert estimate(stats, mean, Bootstrap(1000, 1)) != whole


def test_a_change_relative_to_zero_is_none():
    found = paired_difference(scores([0.0, 0.0]), scores([1.0, 2.0]), mean, BOOTSTRAP)
    assert (found.value, found.change_percent, found.change_interval) == (1.5, None, None)


def test_what_no_float_can_hold_is_none():
    stats = np.array([[9000.0, 1.0], [9000.0, 1.0]])
    assert estimate(stats, perplexity, BOOTSTRAP).value is None
    assert paired_difference(stats, stats, perplexity, BOOTSTRAP).value is None


def test_unpaired_arrays_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        paired_difference(scores([1.0]), scores([1.0, 2.0]), mean, BOOTSTRAP)
