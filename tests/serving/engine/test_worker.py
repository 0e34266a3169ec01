"""The worker runs jobs between steps, and tells of its end."""

from __future__ import annotations

import threading

import pytest

from serving.engine.worker import Worker
from serving.errors import EngineDead


class Load:
    """Steps that are left to do."""

    def __init__(self, steps: int = 0, fails: bool = False) -> None:
        self.steps, self.fails, self.done = steps, fails, 0
        self.deaths: list[Exception] = []
        self.died = threading.Event()

    def busy(self) -> bool:
        return self.done < self.steps

    def step(self) -> None:
        if self.fails:
            raise ArithmeticError("broken")
        self.done += 1

    def report(self, error: Exception) -> None:
        self.deaths.append(error)
        self.died.set()


def make_worker(load: Load) -> Worker:
    worker = Worker(load.busy, load.step, load.report)
    worker.start()
    return worker


def test_a_call_returns_its_result_or_raises_its_error_and_the_worker_lives_on():
    worker = make_worker(Load())
    assert worker.call(lambda: 7).result(5) == 7
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0).result(5)
    assert worker.call(lambda: 8).result(5) == 8
    worker.stop()
    assert not worker.alive


def test_a_posted_job_brings_work():
    load = Load()
    worker = make_worker(load)
    worker.post(lambda: setattr(load, "steps", 5))
    while load.done < 5:
        worker.call(lambda: None).result(5)
    worker.stop()
    assert load.done == 5
    assert not load.deaths


def test_a_failing_step_ends_the_worker_and_is_reported():
    load = Load(steps=1, fails=True)
    worker = make_worker(load)
    assert load.died.wait(5)
    assert [type(error) for error in load.deaths] == [ArithmeticError]
    worker.stop()
    with pytest.raises(EngineDead):
        worker.call(lambda: None)


def test_a_call_that_was_never_run_ends_with_engine_dead():
    worker = Worker(lambda: False, lambda: None, lambda error: None)
    worker.post(None)  # type: ignore[arg-type]  # what `stop` sends
    future = worker.call(lambda: None)
    worker.start()
    with pytest.raises(EngineDead):
        future.result(5)
