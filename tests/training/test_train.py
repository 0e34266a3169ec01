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
from training.train import train


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


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_stopped_run_resumes_to_the_same_bytes(tiny_base: Path, tmp_path: Path, monkeypatch, stop_after: int):
    config = small_config(tiny_base, tmp_path, lora={"dropout": 0.1})
    train(config, tmp_path / "whole", tmp_path)
    real, calls = train_module.optimizer_step, []

    def step_then_signal(run, step):
        calls.append(step)
        record = real(run, step)
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    monkeypatch.setattr(train_module, "optimizer_step", step_then_signal)
    with pytest.raises(TrainingStopped, match=f"after step {stop_after} of 6"):
        train(config, tmp_path / "stopped", tmp_path)
    assert not (tmp_path / "stopped" / "adapter").exists()
    train(config, tmp_path / "stopped", tmp_path, go_on=True)
    assert calls == list(range(6))
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    logs = [
        [(line["step"], line.get("nll_nats")) for line in read_log(tmp_path / run / "train_log.jsonl")]
        for run in ("whole", "stopped")
    ]
    assert logs[0] == logs[1]


def test_resuming_with_another_recipe_or_data_is_refused(tiny_base: Path, tmp_path: Path):
    train(small_config(tiny_base, tmp_path), tmp_path / "run", tmp_path)
    before = weights(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another recipe"):
        train(small_config(tiny_base, tmp_path, lora={"alpha": 4.0}), tmp_path / "run", tmp_path, go_on=True)
    write_rows(tmp_path / "rows.jsonl", 25)
    with pytest.raises(CheckpointError, match="another data"):
        train(small_config(tiny_base, tmp_path), tmp_path / "run", tmp_path, go_on=True)
    assert weights(tmp_path / "run") == before
