"""Checkpoints: whole ones resume, torn and foreign ones never do."""

from __future__ import annotations

import pytest
import torch

from training import checkpoint
from training.checkpoint import Checkpoint, CheckpointError

INPUTS = {"recipe": "r", "data": "d", "base": "b"}


def make(step: int) -> Checkpoint:
    return Checkpoint(
        step, INPUTS, {"w": torch.full((3,), float(step))}, {"state": {0: {"step": torch.tensor(step)}}}, {}
    )


def test_what_is_saved_is_loaded(tmp_path):
    path = checkpoint.save(tmp_path, make(3), keep=2)
    loaded = checkpoint.load(path, INPUTS)
    assert loaded.step == 3
    assert torch.equal(loaded.weights["w"], make(3).weights["w"])
    assert loaded.optimizer["state"][0]["step"] == 3


def test_the_newest_are_kept(tmp_path):
    for step in (5, 9, 10, 100):
        checkpoint.save(tmp_path, make(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000100"]
    assert checkpoint.newest(tmp_path).name == "step-000100"


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.pt", "complete.json"])
@pytest.mark.parametrize("fault", ["cut", "flip", "gone"])
def test_a_torn_checkpoint_is_passed_over(tmp_path, name, fault):
    checkpoint.save(tmp_path, make(1), keep=2)
    victim = checkpoint.save(tmp_path, make(2), keep=2) / name
    content = victim.read_bytes()
    if fault == "gone":
        victim.unlink()
    elif fault == "cut":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.write_bytes(content.replace(content[-9:-8], b"\x00" if content[-9:-8] != b"\x00" else b"\x01"))
    assert checkpoint.newest(tmp_path).name == "step-000001"


def test_an_unfinished_save_is_no_checkpoint_and_hinders_none(tmp_path):
    (tmp_path / ".step-000002.tmp").mkdir()
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path, make(2), keep=1)
    assert checkpoint.newest(tmp_path).name == "step-000002"


def test_other_inputs_are_refused_by_name(tmp_path):
    path = checkpoint.save(tmp_path, make(1), keep=1)
    with pytest.raises(CheckpointError, match="another recipe, base"):
        checkpoint.load(path, {**INPUTS, "recipe": "other", "base": "other"})
