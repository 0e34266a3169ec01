"""The survival of an adapter's update: whether the written weights are base + update, and what rounding left of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from training.deltas import Deltas
from training.errors import TrainingError
from training.ground import Ground, read_weight, shard_of
from training.proof import DeltaSurvival

# Rounding has no bias where updates are larger than a step of the weight; far smaller ones it erases. KL grows with the
# square of a change: a tenth of the update lost is about 1 % of the KL that the adapter made.
SHARE_OFF_ALLOWED = 0.1
_WORST = 5
_NAMED = 3


class BrokenMergeError(TrainingError):
    """Written weights that are not base + update; names each matrix and what is wrong with it."""


def measure_survival(deltas: Deltas, ground: Ground, merged_dir: Path) -> DeltaSurvival:
    """Reads both models matrix by matrix, holding one of them at a time.

    Returns, for each matrix, the written update <round(W + D) - round(W), D> / <D, D>, and that of all together.
    Raises BrokenMergeError where any weight is missing, not finite, more than a rounding step away from base + update,
    or changed though the adapter does not touch it; and where every update is zero.
    """
    theirs, ours = shard_of(ground.base_dir), shard_of(merged_dir)
    faults = [f"{name}: missing" for name in theirs.keys() - ours.keys()]
    faults += [f"{name}: not a weight of the base" for name in ours.keys() - theirs.keys()]
    projected, squared = dict[str, float](), dict[str, float]()
    for name in sorted(theirs.keys() & ours.keys()):
        base, merged = ground.weight(name, read_weight(theirs[name], name)), read_weight(ours[name], name)
        expected = deltas.applied(name, base) if name in deltas.a_RI else base
        faults += [f"{name}: {fault}" for fault in _faults(base, expected, merged)]
        if name in deltas.a_RI and base.shape == merged.shape:
            update = (expected - base.float()).flatten()
            written = (merged.float() - base.to(merged.dtype).float()).flatten()
            projected[name], squared[name] = float(written @ update), float(update @ update)
    if faults:
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise BrokenMergeError(f"{merged_dir} is no merge of that adapter: {'; '.join(faults[:_NAMED])}{more}")
    return _summary(projected, squared)


def _faults(base: torch.Tensor, expected: torch.Tensor, merged: torch.Tensor) -> Iterator[str]:
    if merged.shape != base.shape:
        yield f"shape {tuple(merged.shape)}, not {tuple(base.shape)}"
    elif not merged.is_floating_point():
        if not torch.equal(merged, base):
            yield "changed, though the adapter does not touch it"
    elif bad := int((~merged.isfinite()).sum()):
        yield f"{bad} of {merged.numel()} numbers are NaN or infinite"
    elif expected is base:
        if not torch.equal(merged, base.to(merged.dtype)):
            yield "changed, though the adapter does not touch it"
    elif off := _strayed(base.float(), expected, merged):
        yield f"{off} of {merged.numel()} numbers are not base + update"


def _strayed(base: torch.Tensor, expected: torch.Tensor, merged: torch.Tensor) -> int:
    """Counts the numbers farther from base + update than the written dtype's rounding and fp32's summing allow."""
    info = torch.finfo(merged.dtype)
    largest = max(float((expected - base).abs().max()), float(base.abs().max()))
    smallest_step = info.smallest_normal * info.eps
    allowed = expected.abs().mul_(info.eps).add_(smallest_step + 8 * torch.finfo(torch.float32).eps * largest)
    return int(((merged.float() - expected).abs_() > allowed).sum())


def _summary(projected: dict[str, float], squared: dict[str, float]) -> DeltaSurvival:
    shares = {name: projected[name] / squared[name] for name in projected if squared[name] > 0}
    if not shares:
        raise BrokenMergeError("the adapter changes nothing: all its updates are zero; train it first")
    worst = sorted(shares, key=lambda name: abs(shares[name] - 1), reverse=True)[:_WORST]
    return DeltaSurvival(
        matrices=len(shares),
        share=sum(projected.values()) / sum(squared.values()),
        share_min=min(shares.values()),
        share_median=statistics.median(shares.values()),
        share_off_allowed=SHARE_OFF_ALLOWED,
        worst={name: shares[name] for name in worst},
    )
