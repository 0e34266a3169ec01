"""Two processes train the same adapter as one: rows are shared, the loss is the whole step's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.recipes import small_config
from training.config import resolved_toml
from training.log import read_log

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"]
pytestmark = pytest.mark.slow


def steps(folder: Path, recipe: Path, processes: int) -> list[tuple[float, float]]:
    """Returns (loss, gradient norm) of each step."""
    out = folder / f"run{processes}"
    command = [sys.executable, *LAUNCH, "--num_processes", str(processes), "-m", "training"]
    done = subprocess.run(
        [*command, "train", str(recipe), "--out", str(out)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in read_log(out / "train_log.jsonl") if "nll_nats" in line]
    return [(line["nll_nats"], line["grad_norm"]) for line in lines]


def test_two_processes_follow_the_loss_of_one(tiny_base: Path, tmp_path: Path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(resolved_toml(small_config(tiny_base, tmp_path, data={"held_out": 3}, optim={"batch_size": 5})))
    one, two = steps(tmp_path, recipe, 1), steps(tmp_path, recipe, 2)
    assert len(one) == 10  # 21 rows in steps of 5, twice: the epoch's last step has one row for two processes
    assert [loss for loss, _ in two] == pytest.approx([loss for loss, _ in one], abs=2e-3)
    # AdamW and clipping hide a wrong scale of the gradient; its norm does not.
    assert two[0][1] == pytest.approx(one[0][1], rel=1e-3)
    assert [norm for _, norm in two] == pytest.approx([norm for _, norm in one], rel=2e-2)
    assert one[-1][0] < one[0][0]
