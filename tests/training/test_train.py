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
from training.bad_batch import NonFiniteError
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
    for name in ("recipe.toml", "held_out.jsonl", "loss.png", "data_report.json", "data_report.md"):
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
    with pytest.raises(CheckpointError, match=r"another recipe .lora.alpha = 8.0 then, 4.0 now"):
        train(small_config(tiny_base, tmp_path, lora={"alpha": 4.0}), out, tmp_path, Start.RESUME)
    assert (out / "checkpoints" / "step-000002").is_dir()
    write_rows(tmp_path / "rows.jsonl", 25)
    with pytest.raises(CheckpointError, match="another data"):
        train(config, out, tmp_path, Start.RESUME)
    assert (out / "checkpoints" / "step-000002").is_dir()
    assert train(config, out, tmp_path, Start.FRESH).data.rows_train == 21


OVERFIT = {"learning_rate": 1e-2, "epochs": 12, "schedule": "constant", "warmup_ratio": 0.0}


@pytest.fixture
def validations(monkeypatch):
    """Returns a function that lets the run see these held-out NLLs, one after the other, for those it measures."""
    real = train_module.validation_nll

    def play(*nlls: float) -> None:
        left = list(nlls)
        monkeypatch.setattr(train_module, "validation_nll", lambda run: left.pop(0) if real(run) is not None else None)

    return play


def early(base: Path, folder: Path, **run):
    return small_config(
        base,
        folder,
        optim=OVERFIT,
        run={"eval_every": 2, "save_every": 4, "keep_checkpoints": 1, "early_stopping_patience": 2, **run},
    )


def test_early_stopping_ends_the_run_and_keeps_the_best(tiny_base: Path, tmp_path: Path, validations, capsys):
    validations(9.0, 5.0, 3.0, 4.0, 4.0)  # before the first step, after 2, 4, 6 and 8
    manifest = train(early(tiny_base, tmp_path), tmp_path / "run", tmp_path)
    assert (manifest.loss.steps, manifest.loss.weights_step) == (8, 4)
    assert (manifest.loss.validation_best_nll_nats, manifest.loss.validation_last_nll_nats) == (3.0, 4.0)
    assert "the adapter is that of step 4" in capsys.readouterr().err
    optim = {**OVERFIT, "max_steps": 4}
    validations(9.0, 5.0, 3.0)
    train(small_config(tiny_base, tmp_path, optim=optim), tmp_path / "four", tmp_path)
    assert weights(tmp_path / "run") == weights(tmp_path / "four")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_real_overfit_stops_before_its_end(tiny_base: Path, tmp_path: Path):
    optim = {"learning_rate": 3e-2, "epochs": 40, "schedule": "constant"}
    config = small_config(
        tiny_base, tmp_path, optim=optim, run={"eval_every": 3, "save_every": 50, "early_stopping_patience": 2}
    )
    loss = train(config, tmp_path / "run", tmp_path).loss
    assert loss.steps < 120
    assert loss.weights_step == loss.steps - 6
    assert loss.validation_best_nll_nats < loss.validation_last_nll_nats


def test_without_patience_the_run_goes_to_its_end_and_keeps_the_last(tiny_base: Path, tmp_path: Path, validations):
    validations(9.0, 3.0, 4.0, 5.0)
    config = small_config(tiny_base, tmp_path, run={"eval_every": 2})
    loss = train(config, tmp_path / "run", tmp_path).loss
    assert (loss.steps, loss.weights_step, loss.validation_best_nll_nats) == (6, 6, 3.0)
    validations(9.0, 8.0, 7.0)
    train(small_config(tiny_base, tmp_path, run={"eval_every": 3}), tmp_path / "plain", tmp_path)
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")


@pytest.mark.parametrize("stopped_at", [3, 5, 8])
def test_early_stopping_survives_a_resume(
    tiny_base: Path, tmp_path: Path, validations, monkeypatch, stop_after, stopped_at: int
):
    nlls = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 4.0}
    validations(*nlls.values())
    whole = train(early(tiny_base, tmp_path), tmp_path / "whole", tmp_path)
    stop_after(stopped_at)
    validations(*nlls.values())
    out = tmp_path / "stopped"
    if stopped_at < 8:
        with pytest.raises(TrainingStopped):
            train(early(tiny_base, tmp_path), out, tmp_path)
    else:  # the decision is made, and the adapter not yet written
        with monkeypatch.context() as patch:
            patch.setattr(train_module, "save_adapter", full_disk)
            with pytest.raises(OSError, match="full"):
                train(early(tiny_base, tmp_path), out, tmp_path)
    validations(*(nll for step, nll in nlls.items() if step > stopped_at))
    manifest = train(early(tiny_base, tmp_path), out, tmp_path, Start.RESUME)
    assert manifest.loss == whole.loss
    assert weights(out) == weights(tmp_path / "whole")


def full_disk(*_):
    raise OSError("disk full")


def test_a_held_out_nll_that_is_not_finite_ends_the_run(tiny_base: Path, tmp_path: Path, validations):
    validations(9.0, float("nan"))
    with pytest.raises(NonFiniteError, match="held-out NLL is nan after step 3"):
        train(small_config(tiny_base, tmp_path), tmp_path / "run", tmp_path)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
