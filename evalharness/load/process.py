"""The locust subprocess of one scenario: started, watched, stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from evalharness.load.plan import LoadPlan, Scenario
from evalharness.load.sample import SAMPLES_NAME

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
DRAIN_S = 60  # for the replies under way when the time is up
START_S = 60  # for importing locust on a busy machine
INTERRUPT_S = 15  # from Ctrl-C until locust has written its samples
POLL_S = 0.2
PROGRESS_S, PROGRESS_LINES = 2.0, 30  # between two lines at least, and of a scenario at most
LOG_TAIL_LINES = 15


class LocustFailed(RuntimeError):
    """Locust ended by itself with an error; the message has its log's tail."""


def run_scenario(
    plan: LoadPlan, scenario: Scenario, progress: Callable[[], str | None], say: Callable[[str], None]
) -> bool:
    """Says each line of progress. Returns False where Ctrl-C, or SIGTERM, ended it early; raises LocustFailed."""
    log = plan.out / f"{scenario.file_stem}.log"
    with log.open("wb") as file, _terminate_is_interrupt():
        # Its own process group, so that Ctrl-C reaches it once: locust gives up its samples on a second one.
        process = subprocess.Popen(
            _command(plan, scenario), stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
        )
        try:
            completed = _watch(process, plan.seconds, progress, say)
        finally:
            _end(process)
    if completed and process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        raise LocustFailed(f"locust ended with code {process.returncode}; the end of {log}:\n" + "\n".join(tail))
    return completed


def _command(plan: LoadPlan, scenario: Scenario) -> list[str]:
    options: dict[str, object] = {
        "--locustfile": LOCUSTFILE,
        "--host": plan.url,
        "--users": plan.users,
        "--spawn-rate": plan.spawn_rate,
        "--run-time": f"{plan.seconds}s",
        "--stop-timeout": DRAIN_S,
        "--exit-code-on-error": 0,  # failed requests are samples, not a failure of locust
        "--html": plan.out / f"{scenario.file_stem}.html",
        "--scenario": scenario.name,
        "--samples": plan.out / SAMPLES_NAME,
        "--max-tokens": plan.max_tokens,
    }
    if plan.rate is not None:
        options["--rate"] = plan.rate
    if plan.api_key_env is not None:
        options["--api-key-env"] = plan.api_key_env
    if plan.prompts is not None:
        options["--prompts"] = plan.prompts
    flags = [f"{flag}={value}" for flag, value in options.items()]
    return [sys.executable, "-m", "locust", "--headless", *flags, *(f"--arm={arm}" for arm in scenario.arms)]


def _watch(
    process: subprocess.Popen[bytes], seconds: int, progress: Callable[[], str | None], say: Callable[[str], None]
) -> bool:
    limit_s, every_s = seconds + DRAIN_S + START_S, max(PROGRESS_S, seconds / PROGRESS_LINES)
    started = reported = time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            if time.monotonic() - reported >= every_s:
                reported = time.monotonic()
                if line := progress():
                    say(line)
            if time.monotonic() - started > limit_s:
                raise LocustFailed(f"locust did not end within {limit_s:g} s")
    except KeyboardInterrupt:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(INTERRUPT_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


@contextmanager
def _terminate_is_interrupt() -> Iterator[None]:
    """SIGTERM must not leave locust behind, still sending."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
