"""Two processes train the same adapter as one, each with the whole model or with half of it: rows are shared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.recipes import small_config
from training.artifact import ADAPTER_WEIGHTS, verify_adapter
from training.config import TrainConfig, resolved_toml
from training.log import read_log
from training.train import train

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
# With --cpu the launcher starts one process, whatever --num_processes says; these flags work without a GPU too.
DDP = ("--multi_gpu",)
FSDP = ("--use_fsdp", "--fsdp_version", "2")
pytestmark = pytest.mark.slow


def command(out: Path, config: TrainConfig, flags: Sequence[str], processes: int, *words: str) -> dict[str, Any]:
    recipe = out.with_suffix(".toml")
    recipe.write_text(resolved_toml(config))
    launcher = [*LAUNCH, *flags, "--num_processes", str(processes)] if processes > 1 else []
    return {
        "args": [sys.executable, *launcher, "-m", "training", "train", str(recipe), "--out", str(out), *words],
        "cwd": out.parent,
        "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    }


def launch(
    out: Path, config: TrainConfig, flags: Sequence[str], processes: int, *words: str
) -> subprocess.CompletedProcess[str]:
    asked = command(out, config, flags, processes, *words)
    return subprocess.run(**asked, capture_output=True, text=True, check=False)


def steps(out: Path, config: TrainConfig, flags: Sequence[str] = (), *words: str) -> list[tuple[float, float]]:
    """Returns (loss, gradient norm) of each step; of two processes where there are flags for the launcher."""
    done = launch(out, config, flags, 2 if flags else 1, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("2 processes share the rows of each step" in done.stderr) == bool(flags)
    return read_steps(out)


def read_steps(out: Path) -> list[tuple[float, float]]:
    lines = [line for line in read_log(out / "train_log.jsonl") if "nll_nats" in line]
    return [(line["nll_nats"], line["grad_norm"]) for line in lines]


def check_equal(two: list[tuple[float, float]], one: list[tuple[float, float]]) -> None:
    assert [loss for loss, _ in two] == pytest.approx([loss for loss, _ in one], abs=2e-3)
    # AdamW and clipping hide a wrong scale of the gradient; its norm does not.
    assert two[0][1] == pytest.approx(one[0][1], rel=1e-3)
    assert [norm for _, norm in two] == pytest.approx([norm for _, norm in one], rel=2e-2)
    assert one[-1][0] < one[0][0]


def test_two_processes_follow_the_loss_of_one(tiny_base: Path, tmp_path: Path):
    config = small_config(tiny_base, tmp_path, data={"held_out": 3}, optim={"batch_size": 5})
    one, two = steps(tmp_path / "one", config), steps(tmp_path / "two", config, DDP)
    assert len(one) == 10  # 21 rows in steps of 5, twice: the epoch's last step has one row for two processes
    check_equal(two, one)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler, g++")
def test_two_processes_with_compiled_blocks_train_the_adapter_of_one_without(tiny_base: Path, tmp_path: Path):
    """The blocks are compiled before DDP hangs its hooks on the weights in them."""
    plain, compiled = (
        small_config(tiny_base, tmp_path, optim={"max_steps": 4}, run={"compile": way}) for way in ("off", "on")
    )
    train(plain, tmp_path / "one", tmp_path)
    one, two = read_steps(tmp_path / "one"), steps(tmp_path / "two", compiled, DDP)
    assert [loss for loss, _ in two] == pytest.approx([loss for loss, _ in one], abs=1e-4)
    assert [norm for _, norm in two] == pytest.approx([norm for _, norm in one], rel=1e-3)
    assert two[-1][0] < two[0][0]
    whole, shared = (load_file(tmp_path / name / "adapter" / ADAPTER_WEIGHTS) for name in ("one", "two"))
    for name, weight in whole.items():
        torch.testing.assert_close(shared[name], weight, atol=1e-4, rtol=1e-3)


def test_two_halves_of_a_sharded_model_follow_the_loss_of_one(tiny_base: Path, tmp_path: Path):
    """NF4, small packs, so that the processes have unequal numbers of them, and blocks that are recomputed."""
    config = small_config(
        tiny_base,
        tmp_path,
        model={"quantisation": "nf4"},
        data={"held_out": 3},
        optim={"batch_size": 5, "micro_batch_tokens": 64},
        run={"eval_rows": 3, "gradient_checkpointing": "on"},
    )
    one, two = steps(tmp_path / "one", config), steps(tmp_path / "two", config, FSDP)
    check_equal(two, one)
    losses = [verify_adapter(tmp_path / name / "adapter").loss for name in ("one", "two")]
    assert losses[1].validation_last_nll_nats == pytest.approx(losses[0].validation_last_nll_nats, abs=2e-3)
    whole, sharded = (load_file(tmp_path / name / "adapter" / ADAPTER_WEIGHTS) for name in ("one", "two"))
    assert {name: tensor.shape for name, tensor in sharded.items()} == {
        name: tensor.shape for name, tensor in whole.items()
    }


def test_a_sharded_run_resumes_to_the_same_bytes_and_in_one_process_too(tiny_base: Path, tmp_path: Path):
    """A checkpoint holds whole tensors, so that any number of processes can go on from it."""
    config = small_config(tiny_base, tmp_path, run={"save_every": 1, "early_stopping_patience": 9})
    whole = steps(tmp_path / "whole", config, FSDP)
    process = subprocess.Popen(**command(tmp_path / "again", config, FSDP, 2))
    while not list((tmp_path / "again" / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()  # the launcher hands it on to both
    process.wait()
    shutil.copytree(tmp_path / "again", tmp_path / "alone")
    assert steps(tmp_path / "again", config, FSDP, "--resume") == whole
    weights = [(tmp_path / name / "adapter" / ADAPTER_WEIGHTS).read_bytes() for name in ("again", "whole")]
    assert weights[0] == weights[1]
    check_equal(steps(tmp_path / "alone", config, (), "--resume"), whole)
