"""The thread that owns the model: it runs jobs between steps, and steps while there is work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from serving.errors import EngineDead

T = TypeVar("T")
Job = Callable[[], None]


class Worker:
    """Calls `step` for as long as `busy`; a job that raises fails alone, a step that raises ends the thread."""

    def __init__(self, busy: Callable[[], bool], step: Callable[[], None], died: Callable[[Exception], None]) -> None:
        self._busy, self._step, self._died = busy, step, died
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._calls: set[Future[Any]] = set()  # that have no result yet
        self._lock = threading.Lock()  # of `_calls` and `_ended`
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def post(self, job: Job) -> None:
        """Has `job` run before the next step, unless the thread ends before; it must not raise."""
        self._jobs.put(job)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Has `function` run before the next step; the future carries its result or its exception, else EngineDead."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # handed to the caller, whatever it is
                future.set_exception(error)
            with self._lock:
                self._calls.discard(future)

        future.set_running_or_notify_cancel()
        with self._lock:
            if self._ended:
                raise EngineDead("the engine has ended")
            self._calls.add(future)
            self._jobs.put(job)
        return future

    def stop(self) -> None:
        """Ends the thread after the step that runs now; returns when it has ended."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._do_jobs():
                    if self._busy():
                        self._step()
        except Exception as error:  # the engine's end, told to all who wait
            self._died(error)
        finally:
            self._end()

    def _do_jobs(self) -> bool:
        """Runs the jobs that are there, waiting for one where there is no other work; False: stop."""
        wait = not self._busy()
        while True:
            try:
                job = self._jobs.get(block=wait)
            except Empty:
                return True
            if job is None:
                return False
            job()
            wait = False

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            for future in self._calls:
                future.set_exception(EngineDead("the engine ended before this was done"))
            self._calls.clear()
