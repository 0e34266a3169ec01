"""The lengths of many rows: mean, percentiles and a histogram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass(frozen=True, slots=True)
class Lengths:
    """In tokens. `histogram`: rows of each length from a power of two, or 0, to below the next."""

    shortest: int
    mean: float
    percentiles: dict[str, float]
    longest: int
    histogram: dict[str, int]


def measure(lengths: Sequence[int]) -> Lengths:
    """Raises ValueError without any length."""
    if not lengths:
        raise ValueError("lengths of no rows")
    found = np.array(lengths, dtype=np.int64)
    bounds = [0, *(2**power for power in range(int(found.max()).bit_length() + 1))]
    counts, _ = np.histogram(found, bounds)
    return Lengths(
        shortest=int(found.min()),
        mean=float(found.mean()),
        percentiles={
            f"p{at}": float(value) for at, value in zip(_PERCENTILES, np.percentile(found, _PERCENTILES), strict=True)
        },
        longest=int(found.max()),
        histogram={
            f"{low}-{high - 1}": int(rows) for (low, high), rows in zip(pairwise(bounds), counts, strict=True) if rows
        },
    )
