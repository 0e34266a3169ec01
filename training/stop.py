"""Stop requests: SIGTERM and SIGINT noted, to be honoured between two steps."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: stopped and saved, run again with --resume


class TrainingStopped(Exception):
    """A signal came; the run is saved at a step boundary and `--resume` goes on from there."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yields a list that holds the signal once SIGTERM or SIGINT came; a second one ends the process as usual."""
    seen: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("stopping after this step; again to stop at once", file=sys.stderr, flush=True)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
