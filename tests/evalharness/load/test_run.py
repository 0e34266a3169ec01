"""Arrivals, choices and the sample file of a scenario."""

from __future__ import annotations

import itertools
import random

import pytest

from evalharness.load.run import LoadRun, poisson_arrivals
from evalharness.load.sample import SampleStatus, read_samples
from evalharness.load.stream import StreamWatch

CHATS = (({"role": "user", "content": "Hello"},),)


class HandClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.time_s = 50.0

    def __call__(self) -> float:
        return self.time_s


def test_arrivals_keep_the_rate_and_are_irregular():
    times = list(itertools.islice(poisson_arrivals(4.0, 10.0, random.Random(1)), 4000))
    assert times == sorted(times)
    assert 4000 / (times[-1] - 10.0) == pytest.approx(4.0, rel=0.05)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert min(gaps) < 0.05
    assert max(gaps) > 0.5


def test_a_closed_loop_has_no_arrivals(tmp_path):
    run = LoadRun("base", ["base"], CHATS, tmp_path / "s.jsonl")
    run.begin()
    assert run.claim() is None
    assert run.wait_for(None, "base")
    run.stop()
    assert not run.wait_for(None, "base")
    run.close()
    assert read_samples(tmp_path / "s.jsonl") == []


def test_arrivals_without_a_free_user_are_written_as_not_sent(tmp_path):
    clock = HandClock()
    run = LoadRun("mixed", ["base", "starter"], CHATS, tmp_path / "s.jsonl", rate=10.0, clock=clock)
    run.begin()
    begun = run.now()
    due = run.claim()
    clock.time_s += 20
    run.stop()
    assert not run.wait_for(due, "base")
    run.close()
    samples = read_samples(tmp_path / "s.jsonl")
    assert len(samples) == pytest.approx(200, rel=0.3)
    assert {sample.status for sample in samples} == {SampleStatus.NOT_SENT}
    assert {sample.arm for sample in samples} == {"base", "starter"}
    assert all(begun < sample.scheduled <= begun + 20 for sample in samples)


def test_an_arrival_after_the_end_counts_as_nothing(tmp_path):
    clock = HandClock()
    run = LoadRun("base", ["base"], CHATS, tmp_path / "s.jsonl", rate=0.01, clock=clock)
    run.begin()
    due = run.claim()
    run.stop()
    assert not run.wait_for(due, "base")
    run.close()
    assert read_samples(tmp_path / "s.jsonl") == []


def test_samples_can_be_read_while_the_run_goes_on(tmp_path):
    run = LoadRun("base", ["base"], CHATS, tmp_path / "new" / "s.jsonl")
    run.record(StreamWatch(), "base", None)
    (sample,) = read_samples(tmp_path / "new" / "s.jsonl")
    assert sample.start == pytest.approx(run.now(), abs=5)
    run.close()


def test_choices_repeat_from_run_to_run_and_reach_every_arm(tmp_path):
    def choices(name):
        run = LoadRun("mixed", ["base", "starter"], CHATS, tmp_path / name)
        try:
            return [run.choose()[0] for _ in range(40)]
        finally:
            run.close()

    assert choices("a") == choices("b")
    assert set(choices("c")) == {"base", "starter"}
