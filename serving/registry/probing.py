"""The probes: what an engine computes for an adapter, beside what it computes for the base and what peft computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from uuid import uuid4

from serving.engine.engine import Engine, GenerationRequest, Sampling, Variant, WeightFormat
from serving.registry.revision import ProbeResult, Reference
from training.artifact import Probes

# An update of zeros gives the base's very numbers; rounding under another batch gives up to 1e-6 in float32.
SAME_NATS = 1e-5
# Means over tokens. Two float32 orders of summation differ by about 1e-6 nats, 16-bit arithmetic by about 0.01.
ALLOWED_FLOAT32_NATS, ALLOWED_16BIT_NATS = 1e-3, 0.05
# Of the reference's own distance from its base. Measured on SmolLM2-135M, whose quantisation moves much: the right
# adapter 0.55, twice its scale 0.83, a foreign one 1.0, a negated one 2.1; half the scale (0.67) is not told apart.
ALLOWED_NF4_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of the same tokens in the same order, in nats."""

    base: tuple[float, ...]
    adapter: tuple[float, ...]


async def score(engine: Engine, variant: Variant, ids: Sequence[int], start: int) -> tuple[float, ...]:
    """Returns the log-probability of each of `ids[start:]`; raises what the engine raises."""
    request = GenerationRequest(
        request_id=f"probe-{uuid4().hex}",
        variant=variant,
        prompt_ids=tuple(ids),
        sampling=Sampling(max_tokens=0),
        prompt_logprobs=0,
    )
    found: tuple[float, ...] = ()
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            if delta.prompt_logprobs is not None:
                found = tuple(math.nan if each is None else each.logprob for each in delta.prompt_logprobs[start:])
    return found


def judge(
    served: Scored, reference: Scored | None, source: Probes | None, weights: WeightFormat = WeightFormat.PLAIN
) -> tuple[ProbeResult, list[str]]:
    """Returns the distances, and why the adapter must not answer; `reference` is peft's view, None without one.

    `weights` is how the base is kept here.
    """
    from_base = _distance(served.adapter, served.base)
    result = ProbeResult(Reference.NONE, len(served.adapter), from_base)
    if not all(map(math.isfinite, served.adapter)):
        return result, [f"probes: {_not_finite(served.adapter)} of {result.tokens} log-probabilities are not finite"]
    problems = []
    if from_base <= SAME_NATS:
        problems.append(
            f"probes: its log-probabilities lie {from_base:.1g} nats a token from the base's: it changes nothing"
        )
    if reference is None or source is None:
        return result, problems
    distance, allowed = _from_reference(served, reference, source, weights)
    if not distance <= allowed:
        problems.append(
            f"probes: the engine's log-probabilities lie {distance:.3g} nats a token from those that peft computed "
            f"({source.compute}, {source.dtype}), {allowed:.3g} is allowed: weights, scale or base are not those of "
            "the training"
        )
    return ProbeResult(Reference.MATCHED, result.tokens, from_base, distance, allowed), problems


def _from_reference(served: Scored, reference: Scored, source: Probes, weights: WeightFormat) -> tuple[float, float]:
    """Returns the distance from peft's numbers and what is allowed.

    Where one of the two bases is in NF4 and the other is not, it is the adapter's effect that is compared, adapter less
    base on each side: what quantisation does to the base is in both.
    """
    if (source.compute == "nf4") is not (weights is WeightFormat.NF4):
        allowed = ALLOWED_NF4_SHARE * _distance(reference.adapter, reference.base)
        return _distance(_effect(served), _effect(reference)), allowed
    # How far the two computations of the base lie apart says in which precision the engine runs, beside peft's.
    rounding = _distance(served.base, reference.base)
    exact = source.dtype == "float32" and weights is not WeightFormat.FP16 and rounding <= ALLOWED_FLOAT32_NATS
    return _distance(served.adapter, reference.adapter), ALLOWED_FLOAT32_NATS if exact else ALLOWED_16BIT_NATS


def _effect(scored: Scored) -> tuple[float, ...]:
    return tuple(adapter - base for adapter, base in zip(scored.adapter, scored.base, strict=True))


def _distance(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


def _not_finite(values: Sequence[float]) -> int:
    return sum(not math.isfinite(value) for value in values)
