"""The routing policy: which label of a name answers a request."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

MAX_WEIGHT = 1_000_000  # far beyond, a draw would not fit a float


@dataclass(frozen=True, slots=True)
class Policy:
    """`weights` are shares of the requests by label. `sticky`: a routing key always meets the same label.

    `shadow` names a label that also gets each request, off the path.
    """

    weights: Mapping[str, int]
    sticky: bool = False
    shadow: str | None = None

    def problems(self) -> list[str]:
        """Returns what makes it no policy; empty where it is one."""
        if not self.weights:
            return ["weights is empty; give each label its share, for example {'stable': 90, 'canary': 10}"]
        wrong = {
            label: weight
            for label, weight in self.weights.items()
            if type(weight) is not int or not 1 <= weight <= MAX_WEIGHT
        }
        return [
            f"weights[{label!r}] is {weight!r:.40}; give a whole number from 1 to {MAX_WEIGHT}"
            for label, weight in wrong.items()
        ]

    @property
    def labels(self) -> frozenset[str]:
        return frozenset(self.weights) | ({self.shadow} if self.shadow else frozenset())


def choose(policy: Policy, name: str, routing_key: str | None, draw: Callable[[], float]) -> str:
    """Returns the label that answers; `draw` gives a random number from 0 up to 1.

    A key's label is that of weighted rendezvous hashing: it is the same in every process, and a changed weight moves
    only the keys that have to move.
    """
    if policy.sticky and routing_key is not None:
        return max(policy.weights, key=lambda label: _score(policy.weights[label], name, label, routing_key))
    ends = list(accumulate(policy.weights.values()))
    return list(policy.weights)[bisect_right(ends, draw() * ends[-1])]


def _score(weight: int, name: str, label: str, routing_key: str) -> float:
    hashed = hashlib.blake2b("\0".join((name, label, routing_key)).encode(), digest_size=8).digest()
    uniform = (int.from_bytes(hashed) + 0.5) / 2**64  # within 0 and 1
    return -weight / math.log(uniform)
