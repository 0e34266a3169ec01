"""Estimates with 95 % intervals from per-sample sufficient statistics, by a seeded paired bootstrap.

N samples, K statistics, R resamples. Every metric is a function of sums over samples, so a resample is a weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Aggregate = Callable[[FloatArray], FloatArray]  # sums_RK -> values_R
PERCENTILES = (2.5, 97.5)
CHUNK_CELLS = 2_000_000  # resample counts held at once, 16 MB


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Bootstrap:
    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """`value` is None where nothing was scored; `interval` where fewer than two samples were."""

    value: float | None
    interval: Interval | None
    count: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Arm minus base over the samples that both have; `change` is relative to base, in percent."""

    value: float | None
    interval: Interval | None
    change_percent: float | None
    change_interval: Interval | None
    pairs: int


NO_DIFFERENCE = Difference(None, None, None, None, 0)


def mean(sums_RK: FloatArray) -> FloatArray:
    """The aggregate of statistics (sum, weight): a plain or weighted mean."""
    return np.asarray(sums_RK[:, 0] / sums_RK[:, 1])


def perplexity(sums_RK: FloatArray) -> FloatArray:
    """The aggregate of statistics (nll_nats, tokens): corpus perplexity."""
    with np.errstate(over="ignore"):  # beyond a float: no value, see _finite
        return np.exp(mean(sums_RK))


def estimate(stats_NK: FloatArray, aggregate: Aggregate, bootstrap: Bootstrap) -> Estimate:
    count = len(stats_NK)
    if count == 0:
        return Estimate(None, None, 0)
    value = _finite(aggregate(stats_NK.sum(axis=0, keepdims=True)))
    interval = _interval(aggregate(_resampled_sums(stats_NK, bootstrap))) if count > 1 else None
    return Estimate(value, interval, count)


def paired_difference(
    base_NK: FloatArray, arm_NK: FloatArray, aggregate: Aggregate, bootstrap: Bootstrap
) -> Difference:
    """Row i of both arrays is the same sample; both arms are resampled together."""
    if base_NK.shape != arm_NK.shape:
        raise ValueError(f"paired statistics have shapes {base_NK.shape} and {arm_NK.shape}; they must be equal")
    if len(base_NK) == 0:
        return NO_DIFFERENCE
    pairs, width = base_NK.shape
    both_NK = np.concatenate([base_NK, arm_NK], axis=1)
    value, change = _difference(both_NK.sum(axis=0, keepdims=True), width, aggregate)
    if pairs == 1:
        return Difference(_finite(value), None, _finite(change), None, 1)
    values_R, changes_R = _difference(_resampled_sums(both_NK, bootstrap), width, aggregate)
    return Difference(_finite(value), _interval(values_R), _finite(change), _interval(changes_R), pairs)


def _difference(sums_RK: FloatArray, width: int, aggregate: Aggregate) -> tuple[FloatArray, FloatArray]:
    base_R, arm_R = aggregate(sums_RK[:, :width]), aggregate(sums_RK[:, width:])
    with np.errstate(divide="ignore", invalid="ignore"):
        return arm_R - base_R, 100 * (arm_R - base_R) / base_R


def _resampled_sums(stats_NK: FloatArray, bootstrap: Bootstrap) -> FloatArray:
    count, width = stats_NK.shape
    generator = np.random.default_rng(bootstrap.seed)
    sums_RK = np.empty((bootstrap.resamples, width))
    step = max(1, CHUNK_CELLS // count)
    for start in range(0, bootstrap.resamples, step):
        size = min(step, bootstrap.resamples - start)
        counts = generator.multinomial(count, np.full(count, 1 / count), size=size)
        sums_RK[start : start + size] = counts @ stats_NK
    return sums_RK


def _interval(values_R: FloatArray) -> Interval | None:
    if not np.isfinite(values_R).all():  # a change relative to zero
        return None
    low, high = np.percentile(values_R, PERCENTILES)
    return Interval(float(low), float(high))


def _finite(values: FloatArray) -> float | None:
    return float(values[0]) if np.isfinite(values[0]) else None
