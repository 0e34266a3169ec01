"""The lock of a run directory: one training at a time writes there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import TrainingError

_NAME = ".lock"


class BusyError(TrainingError):
    """A run directory in which another process trains; names it."""


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Holds `out` for this process; the system lets go of it however the process ends. Raises BusyError.

    The file stays: were it removed, two processes could each lock one of that name.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / _NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BusyError(
                f"{out}: process {file.read().strip() or 'unknown'} trains there; wait for it, stop it, or give "
                "another directory with --out"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
