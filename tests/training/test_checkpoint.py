"""Checkpoints: whole ones resume, torn and foreign ones never do."""

from __future__ import annotations

import resource
from dataclasses import replace

import pytest
import torch

from training import checkpoint
from training.checkpoint import Checkpoint, CheckpointError

RECIPE = "[lora]\nrank = 8\nalpha = 16.0\n"
INPUTS = {"recipe": RECIPE, "data": "d", "base": "b"}


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
    with pytest.raises(CheckpointError, match="another recipe") as refusal:
        checkpoint.load(path, {**INPUTS, "recipe": RECIPE.replace("8", "4"), "base": "0123456789abcdef"})
    assert "recipe (lora.rank = 8 then, 4 now), another base (b then, 0123456789ab now)" in str(refusal.value)
    assert "--fresh" in str(refusal.value)


def test_the_best_outlives_the_newest(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, make(step), keep=2, best_step=min(step, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]
    assert checkpoint.load(checkpoint.of_step(tmp_path, 2), INPUTS).step == 2
    checkpoint.save(tmp_path, make(6), keep=1, best_step=6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]


def test_a_best_checkpoint_that_is_torn_is_refused(tmp_path):
    (checkpoint.save(tmp_path, make(1), keep=1) / "adapter.safetensors").write_bytes(b"")
    for step in (1, 2):
        with pytest.raises(CheckpointError, match="gone or torn"):
            checkpoint.of_step(tmp_path, step)


def test_a_budget_that_memory_lowered_is_remembered(tmp_path):
    path = checkpoint.save(tmp_path, replace(make(1), micro_batch_tokens=77), keep=1)
    assert checkpoint.load(path, INPUTS).micro_batch_tokens == 77


def test_a_changed_recipe_names_its_first_fields_and_counts_the_rest(tmp_path):
    many = "[data]\n" + "".join(f"f{number} = {number}\n" for number in range(8))
    path = checkpoint.save(tmp_path, replace(make(1), inputs={**INPUTS, "recipe": many}), keep=1)
    with pytest.raises(CheckpointError, match=r"data\.f0 = 0 then, unset now; .*; and 5 more"):
        checkpoint.load(path, INPUTS)


def test_torn_ones_are_told_by_file_and_fault(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, make(step), keep=3)
    (tmp_path / "step-000003" / "optimizer.pt").unlink()
    (tmp_path / "step-000002" / "adapter.safetensors").write_bytes(b"torn")
    told = checkpoint.torn(tmp_path)
    assert [line.removeprefix(f"{tmp_path}/") for line in told] == [
        "step-000003/optimizer.pt: missing",
        "step-000002/adapter.safetensors: not as it was written (sha256 differs)",
    ]
    assert not checkpoint.is_empty(tmp_path)
    assert checkpoint.torn(tmp_path / "none") == []


def test_a_refused_write_drops_nothing_and_gives_back_its_space(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, make(step), keep=2)
    large = replace(make(3), weights={"w": torch.zeros(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(tmp_path, large, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert checkpoint.newest(tmp_path).name == "step-000002"


def test_what_a_killed_process_left_is_removed(tmp_path):
    checkpoint.save(tmp_path, make(1), keep=1)
    for name in (".step-000002.tmp", ".step-000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").write_bytes(b"half")
    checkpoint.discard_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.discard(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_millionth_step_is_newer_than_the_one_before(tmp_path):
    for step in (999_999, 1_000_000):
        checkpoint.save(tmp_path, make(step), keep=1)
    assert checkpoint.newest(tmp_path).name == "step-1000000"
