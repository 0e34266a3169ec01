"""A real training process that is killed where the test says, forked from a server that has imported torch once."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

PRELOAD = [
    "tests.integration.crash",
    "tests.integration.warm",
    "training.__main__",
    "training.train",
]
_WRITES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}  # audit events


def run_training(recipe: str, out: str, cache: str, words: tuple[str, ...], trap: dict[str, int]) -> None:
    """Runs `python -m training train` in this process, with `trap` set, and exits with its code."""
    from training.__main__ import main

    error = (Path(out).parent / "stderr.txt").open("a")
    os.dup2(error.fileno(), sys.stderr.fileno())
    os.dup2(error.fileno(), sys.stdout.fileno())
    os.environ["GRAFT_CACHE"] = cache
    if "kill_at_write" in trap:
        _kill_at_write(out, trap["kill_at_write"])
    if "file_size" in trap:
        resource.setrlimit(resource.RLIMIT_FSIZE, (trap["file_size"], resource.RLIM_INFINITY))
    if "count_writes" in trap:
        _count_writes(out)
    code = main(["train", recipe, "--out", out, *words])
    sys.stdout.flush()
    os._exit(code)


def _touches(out: str, event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is about to change something below `out`; opening to read changes nothing."""
    if event not in _WRITES or not arguments or not isinstance(arguments[0], str | os.PathLike):
        return False
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return False
    return str(arguments[0]).startswith(out + os.sep)


def _kill_at_write(out: str, number: int) -> None:
    left = [number]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _touches(out, event, arguments):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _count_writes(out: str) -> None:
    """Appends each write's event and path to `writes.txt` beside `out`."""
    log = os.open(Path(out).parent / "writes.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _touches(out, event, arguments):
            os.write(log, f"{event} {arguments[0]}\n".encode())

    sys.addaudithook(hook)
