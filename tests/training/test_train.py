"""The run: an adapter that verifies, a resume that changes nothing, a signal that loses nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.recipes import small_config, write_rows
from training import train as train_module
from training.artifact import ADAPTER_WEIGHTS, verify_adapter
from training.checkpoint import CheckpointError
from training.log import read_log
from training.stop import TrainingStopped
from training.train import Start, train


def weights(run: Path) -> bytes:
    return (run / "adapter" / ADAPTER_WEIGHTS).read_bytes()


def test_a_run_leaves_a_verified_adapter_and_its_records(tiny_base: Path, tmp_path: Path):
    config = small_config(tiny_base, tmp_path, model={"quantisation": "nf4"})
    manifest = train(config, tmp_path / "run", tmp_path)
    assert verify_adapter(tmp_path / "run" / "adapter") == manifest
    assert manifest.recipe == config.model_dump(mode="json")
    assert manifest.quantisation == "nf4-double"
    assert (manifest.data.rows_train, manifest.data.rows_held_out) == (20, 4)
    assert manifest.loss.validation_last_nll_nats < manifest.loss.validation_first_nll_nats
    names = load_file(tmp_path / "run" / "adapter" / ADAPTER_WEIGHTS)
    assert len(names) == 2 * 7 * 2  # two layers of seven linear modules, A and B
    steps = [line["step"] for line in read_log(tmp_path / "run" / "train_log.jsonl") if "nll_nats" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    for name in ("recipe.toml", "held_out.jsonl", "loss.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0


@pytest.fixture
def stop_after(monkeypatch):
    """Returns a function that makes a SIGTERM arrive during the given step, once; and the steps that ran."""
    real, calls = train_module.optimizer_step, []

    def arm(count: int) -> list[int]:
        def step_then_signal(run, step):
            calls.append(step)
            record = real(run, step)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return record

        monkeypatch.setattr(train_module, "optimizer_step", step_then_signal)
        return calls

    return arm


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_run_resumes_to_the_same_bytes(tiny_base: Path, tmp_path: Path, stop_after, steps: int):
    config = small_config(tiny_base, tmp_path, lora={"dropout": 0.1})
    train(config, tmp_path / "whole", tmp_path)
    calls = stop_after(steps)
    with pytest.raises(TrainingStopped, match=f"after step {steps} of 6"):
        train(config, tmp_path / "stopped", tmp_path)
    assert not (tmp_path / "stopped" / "adapter").exists()
    train(config, tmp_path / "stopped", tmp_path, Start.RESUME)
    assert calls == list(range(6))
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    logs = [
        [(line["step"], line.get("nll_nats")) for line in read_log(tmp_path / run / "train_log.jsonl")]
        for run in ("whole", "stopped")
    ]
    assert logs[0] == logs[1]
    assert not (tmp_path / "stopped" / "checkpoints").exists()


def test_an_unfinished_run_is_neither_lost_nor_mixed(tiny_base: Path, tmp_path: Path, stop_after):
    config, out = small_config(tiny_base, tmp_path), tmp_path / "run"
    stop_after(2)
    with pytest.raises(TrainingStopped):
        train(config, out, tmp_path)
    with pytest.raises(CheckpointError, match="--resume, or discard it with --fresh"):
        train(config, out, tmp_path)
    with pytest.raises(CheckpointError, match="another recipe"):
        train(small_config(tiny_base, tmp_path, lora={"alpha": 4.0}), out, tmp_path, Start.RESUME)
    assert (out / "checkpoints" / "step-000002").is_dir()
    write_rows(tmp_path / "rows.jsonl", 25)
    with pytest.raises(CheckpointError, match="another data"):
        train(config, out, tmp_path, Start.RESUME)
    assert (out / "checkpoints" / "step-000002").is_dir()
    assert train(config, out, tmp_path, Start.FRESH).data.rows_train == 21
