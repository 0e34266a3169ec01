"""Arm labels: a model's name without its digest, where the name alone tells the arms apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_PINNED = re.compile(r"(?P<name>.+)@(?P<revision>[0-9a-f]{6,64})")


@dataclass(frozen=True, slots=True)
class ArmLabel:
    name: str
    revision: str | None  # the digest that was cut off the name


def arm_labels(arms: Sequence[str]) -> dict[str, ArmLabel]:
    """Returns a label for each arm, in their order; no two have the same name."""
    short = {arm: _split(arm) for arm in arms}
    taken = Counter(label.name for label in short.values())
    return {arm: label if taken[label.name] == 1 else ArmLabel(arm, None) for arm, label in short.items()}


def _split(arm: str) -> ArmLabel:
    match = _PINNED.fullmatch(arm)
    return ArmLabel(match["name"], match["revision"]) if match else ArmLabel(arm, None)
