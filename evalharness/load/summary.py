"""The summary of load samples: counts, rates and percentiles for each scenario and arm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evalharness.load.plan import ALL_ARMS, MIXED
from evalharness.load.sample import LoadSample, SampleStatus

STEADY_P99 = 100  # below so many values the 99th percentile is little else than the largest


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles in seconds over `n` values; interpolated linearly between the neighbouring values."""

    n: int
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class LoadRow:
    """One arm in one scenario. Latencies are those of answered requests; None where there is no value."""

    scenario: str
    arm: str
    requests: int
    answered: int
    errors: dict[str, int]  # by kind
    window_s: float | None  # from the first start to the last end of the scenario's requests
    requests_per_s: float | None  # answered ones
    output_tokens: int
    output_tokens_per_s: float | None
    without_usage: int  # answered requests that reported no tokens
    without_content: int  # answered requests whose reply was empty: they have no TTFT
    ttft_s: Latency | None
    tpot_s: Latency | None
    e2e_s: Latency | None
    ttft_from_arrival_s: Latency | None  # open loop: with the wait for a free user
    e2e_from_arrival_s: Latency | None

    @property
    def error_share(self) -> float | None:
        return None if not self.requests else 1 - self.answered / self.requests


def percentile(values: Sequence[float], q: float) -> float:
    """`values` sorted and not empty, `q` in percent."""
    position = (len(values) - 1) * q / 100
    low, high = math.floor(position), math.ceil(position)
    return values[low] + (values[high] - values[low]) * (position - low)


def latency(values: Iterable[float | None]) -> Latency | None:
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return Latency(len(known), percentile(known, 50), percentile(known, 90), percentile(known, 99))


def summarise(samples: Sequence[LoadSample]) -> list[LoadRow]:
    """Returns the rows in the order of the samples: each arm, and for the mixed scenario all arms together too."""
    rows = []
    for scenario in dict.fromkeys(sample.scenario for sample in samples):
        of_scenario = [sample for sample in samples if sample.scenario == scenario]
        window_s = _window_s(of_scenario)
        for arm in sorted({sample.arm for sample in of_scenario}):
            rows.append(_row(scenario, arm, [sample for sample in of_scenario if sample.arm == arm], window_s))
        if scenario == MIXED:
            rows.append(_row(scenario, ALL_ARMS, of_scenario, window_s))
    return rows


def _row(scenario: str, arm: str, samples: Sequence[LoadSample], window_s: float | None) -> LoadRow:
    answered = [sample for sample in samples if sample.status is SampleStatus.OK]
    tokens = sum(sample.completion_tokens or 0 for sample in answered)
    without_usage = sum(sample.completion_tokens is None for sample in answered)
    return LoadRow(
        scenario=scenario,
        arm=arm,
        requests=len(samples),
        answered=len(answered),
        errors=dict(Counter(sample.kind for sample in samples if sample.status is not SampleStatus.OK).most_common()),
        window_s=window_s,
        requests_per_s=None if not window_s else len(answered) / window_s,
        output_tokens=tokens,
        output_tokens_per_s=None if not window_s or without_usage else tokens / window_s,
        without_usage=without_usage,
        without_content=sum(sample.ttft_s is None for sample in answered),
        ttft_s=latency(sample.ttft_s for sample in answered),
        tpot_s=latency(sample.tpot_s for sample in answered),
        e2e_s=latency(sample.e2e_s for sample in answered),
        ttft_from_arrival_s=latency(_from_arrival(sample, sample.ttft_s) for sample in answered),
        e2e_from_arrival_s=latency(_from_arrival(sample, sample.e2e_s) for sample in answered),
    )


def _window_s(samples: Sequence[LoadSample]) -> float | None:
    starts = [sample.start for sample in samples if sample.start is not None]
    ends = [sample.start + sample.e2e_s for sample in samples if sample.start is not None and sample.e2e_s is not None]
    return max(ends) - min(starts) if ends else None


def _from_arrival(sample: LoadSample, duration_s: float | None) -> float | None:
    return None if sample.queued_s is None or duration_s is None else sample.queued_s + duration_s
