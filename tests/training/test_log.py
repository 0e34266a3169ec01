"""The training log: whole lines, resumable, and a plot that is a picture."""

from __future__ import annotations

import io

import pytest

from training.log import Progress, StepRecord, TrainLog, ValidationRecord, clock, plot_loss, read_log


def record(step: int) -> StepRecord:
    return StepRecord(step, step / 10, 2.0 / step, 1e-3, 0.5, 100, 60, 50.0, 1.5)


def test_lines_are_read_back_and_a_torn_last_one_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainLog(path)
    log.add(record(1))
    log.add(ValidationRecord(1, 1.5))
    with path.open("a") as file:
        file.write('{"step": 2, "nll')
    assert [line["step"] for line in read_log(path)] == [1, 1]
    assert log.losses() == [(1, 2.0)]
    assert log.validation() == [(1, 1.5)]


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainLog(path)
    for step in range(1, 6):
        log.add(record(step))
    assert [step for step, _ in TrainLog(path, resume_step=3).losses()] == [1, 2, 3]
    assert TrainLog(path).losses() == []


def test_the_plot_is_a_png(tmp_path):
    log = TrainLog(None)
    for step in range(1, 6):
        log.add(record(step))
    log.add(ValidationRecord(5, 1.0))
    plot_loss(log, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_progress_names_step_loss_speed_and_eta():
    out = io.StringIO()
    Progress(10, 0, out).step(record(2), show=True)
    line = out.getvalue()
    assert line.startswith("step 2/10  loss 1.000")
    assert "tok/s" in line
    assert "ETA" in line


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3605, "1:00:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_the_best_validation_is_the_lowest_of_the_trained_and_the_earliest_of_equals():
    log = TrainLog(None)
    assert (log.best(), log.stale()) == (None, 0)
    log.add(ValidationRecord(0, 0.5))  # of the base
    assert (log.best(), log.stale()) == (None, 0)
    for step, nll, best, stale in ((2, 3.0, 2, 0), (4, 2.0, 4, 0), (6, 2.0, 4, 1), (8, 2.5, 4, 2), (10, 1.9, 10, 0)):
        log.add(ValidationRecord(step, nll))
        assert log.best() is not None
        assert (log.best()[0], log.stale()) == (best, stale)
