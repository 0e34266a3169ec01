"""The state that all users of one load scenario share: its arrivals, its choices and its sample file."""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from evalharness.load.sample import LoadSample, SampleStatus
from evalharness.load.stream import Chat, StreamWatch

SEED = 20  # fixes arms, prompts and arrivals, so that two runs send alike


def poisson_arrivals(rate: float, start: float, rng: random.Random) -> Iterator[float]:
    """Yields the times of independent arrivals, `rate` a second on average, whatever the server does."""
    due = start
    while True:
        due += rng.expovariate(rate)
        yield due


class LoadRun:
    """Times are Unix seconds from one monotonic clock. `rate` None is a closed loop: users ask again at once."""

    def __init__(
        self,
        scenario: str,
        arms: Sequence[str],
        chats: Sequence[Chat],
        samples: Path,
        *,
        rate: float | None = None,
        api_key: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scenario, self.arms, self.chats, self.rate = scenario, tuple(arms), tuple(chats), rate
        self.api_key = api_key
        self.tls = ssl.create_default_context()  # one for all users: making it takes longer than a request
        self.stopping = threading.Event()
        self._clock, self._epoch = clock, time.time() - clock()
        self._rng = random.Random(SEED)
        self._arrivals: Iterator[float] | None = None
        self._stopped_at: float | None = None
        samples.parent.mkdir(parents=True, exist_ok=True)
        self._file = samples.open("a", encoding="utf-8")

    def now(self) -> float:
        return self._epoch + self._clock()

    def begin(self) -> None:
        if self.rate is not None:
            self._arrivals = poisson_arrivals(self.rate, self.now(), random.Random(SEED))

    def choose(self) -> tuple[str, Chat]:
        return self._rng.choice(self.arms), self._rng.choice(self.chats)

    def claim(self) -> float | None:
        """Takes the next arrival, due now or later; None in a closed loop."""
        return None if self._arrivals is None else next(self._arrivals)

    def wait_for(self, due: float | None, arm: str) -> bool:
        """Sleeps until an arrival is due; False where the test ends first. An overdue one then counts as not sent."""
        delay_s = 0.0 if due is None else max(due - self.now(), 0.0)
        if not self.stopping.wait(delay_s):
            return True
        if due is not None and self._stopped_at is not None and due <= self._stopped_at:
            self._write_unsent(due, arm)
        return False

    def record(self, watch: StreamWatch, arm: str, due: float | None) -> LoadSample:
        sample = watch.sample(self.scenario, arm, self._epoch + watch.started, due)
        self._write(sample)
        return sample

    def stop(self) -> None:
        """No request begins after this; those under way drain."""
        self._stopped_at = self._stopped_at or self.now()
        self.stopping.set()

    def close(self) -> None:
        """Writes down the arrivals that never found a free user, then closes the file."""
        if self._file.closed:
            return
        while self._stopped_at is not None and (due := self.claim()) is not None and due <= self._stopped_at:
            self._write_unsent(due, self.choose()[0])
        self._file.close()

    def _write_unsent(self, due: float, arm: str) -> None:
        self._write(
            LoadSample(
                scenario=self.scenario,
                arm=arm,
                scheduled=due,
                start=None,
                status=SampleStatus.NOT_SENT,
                error="no user was free before the end",
            )
        )

    def _write(self, sample: LoadSample) -> None:
        self._file.write(sample.model_dump_json() + "\n")
        self._file.flush()  # the file is read while it grows, and must survive a kill
