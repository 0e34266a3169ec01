"""Trackers get every record of a run, and one that cannot be used is refused before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from tests.training.recipes import small_config
from training import train as train_module
from training.log import read_log
from training.trackers import TrackerError, require_trackers
from training.train import train


class ListTracker(GeneralTracker):
    """A tracker as accelerate's users write their own."""

    name = "list_of_records"
    requires_logging_directory = False
    opened: list[ListTracker]

    def __init__(self, run_name: str) -> None:
        self.run_name, self.records, self.finished = run_name, [], False
        super().__init__()
        self.opened.append(self)

    @property
    def tracker(self) -> list[Any]:
        return self.records

    def start(self) -> None:
        self.configuration: dict[str, Any] = {}

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.records.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ListTracker]]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, ListTracker.name, ListTracker)
    monkeypatch.setattr(ListTracker, "opened", [], raising=False)
    return ListTracker.opened


def test_a_tracker_gets_the_recipe_and_every_record(tiny_base: Path, tmp_path: Path, listed):
    config = small_config(tiny_base, tmp_path, run={"trackers": ["list_of_records"]})
    train(config, tmp_path / "run", tmp_path)
    (tracker,) = listed
    assert tracker.run_name == "small"
    assert tracker.finished
    assert tracker.configuration["lora.rank"] == 4
    assert all(isinstance(value, str | float | int) for value in tracker.configuration.values())
    logged = [{"step": step, **values} for step, values in tracker.records]
    assert logged == [
        {key: value for key, value in line.items() if value is not None}
        for line in read_log(tmp_path / "run" / "train_log.jsonl")
    ]
    assert len(logged) == 6 + 3


def test_a_tracker_is_closed_where_the_run_fails(tiny_base: Path, tmp_path: Path, listed, monkeypatch):
    def broken(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(train_module, "optimizer_step", broken)
    with pytest.raises(OSError, match="no space"):
        train(small_config(tiny_base, tmp_path, run={"trackers": ["list_of_records"]}), tmp_path / "run", tmp_path)
    assert listed[0].finished


def test_a_tracker_that_is_not_installed_is_refused_before_training(tiny_base: Path, tmp_path: Path):
    absent = sorted(set(LoggerType.list()) - {"all"} - {str(name) for name in get_available_trackers()})
    assert absent, "every tracker that accelerate knows is installed here"
    config = small_config(tiny_base, tmp_path, run={"trackers": [absent[0]]})
    with pytest.raises(TrackerError, match=f"pip install {absent[0]}"):
        train(config, tmp_path / "run", tmp_path)
    assert not (tmp_path / "run" / "train_log.jsonl").exists()


def test_an_unknown_tracker_is_named_with_the_nearest_known():
    with pytest.raises(TrackerError, match=r"'tensorbord'; did you mean tensorboard\?"):
        require_trackers(["tensorbord"])


def test_tensorboard_gets_its_event_file(tiny_base: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    config = small_config(tiny_base, tmp_path, run={"trackers": ["tensorboard"]})
    train(config, tmp_path / "run", tmp_path)
    assert list((tmp_path / "run" / "trackers" / "small").glob("events.*"))
