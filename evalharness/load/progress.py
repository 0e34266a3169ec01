"""The progress line of a running scenario, from the samples as they come."""

from __future__ import annotations

from pathlib import Path

from evalharness.load.sample import SampleStatus, SampleTail
from evalharness.load.summary import latency


class Progress:
    """Counts the scenario's requests; the TTFT is of those since the last line."""

    def __init__(self, samples: Path, scenario: str) -> None:
        self._tail, self._scenario = SampleTail(samples), scenario
        self._requests = self._failed = 0

    def line(self) -> str | None:
        """Returns None before the first sample."""
        new = [sample for sample in self._tail.read() if sample.scenario == self._scenario]
        self._requests += len(new)
        self._failed += sum(sample.status is not SampleStatus.OK for sample in new)
        if not self._requests:
            return None
        ttft_s = latency(sample.ttft_s for sample in new)
        now = "" if ttft_s is None else f", TTFT p50 now {ttft_s.p50 * 1000:.0f} ms"
        return f"  {self._scenario}: {self._requests} requests, {self._failed} failed{now}"
