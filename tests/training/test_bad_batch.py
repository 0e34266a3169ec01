"""A step whose loss or gradient is not finite ends the run, with its rows on disk and the weights untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from tests.training.recipes import small_config
from training import train as train_module
from training.bad_batch import BAD_BATCH, NonFiniteError
from training.checkpoint import newest
from training.run import Run, assemble
from training.sources import read_file
from training.step import optimizer_step
from training.train import train

NUMBER_OF_POISON = 7  # of the row whose own words the model cannot bear


def poison(run: Run, value: float) -> int:
    """Makes the embedding of a token that stands in one training row alone infinite or NaN; returns the row."""
    index = run.data.train_numbers.index(NUMBER_OF_POISON)
    rows = [set(example.input_ids) for example in run.data.train]
    alone = rows[index] - set().union(*rows[:index], *rows[index + 1 :])
    assert alone
    with torch.no_grad():
        run.peft_model.get_input_embeddings().weight[min(alone)] = value
    return index


def make_run(base: Path, folder: Path, **sections: dict[str, Any]) -> Run:
    rows = folder / "rows.jsonl"
    lines = [{"instruction": f"Say {c}{c}", "output": f"one {c}"} for c in "abcdefghijklmnopqrst"]
    lines[NUMBER_OF_POISON - 1]["instruction"] = "Say \N{SNOWMAN}"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    sections = {"optim": {"batch_size": 20, "micro_batch_tokens": 256, "epochs": 4}} | sections
    return assemble(small_config(base, folder, **{"data": {"held_out": 0}, **sections}), folder / "run", folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_rows_that_break_the_loss_are_saved(tiny_base: Path, tmp_path: Path, value: float):
    run = make_run(tiny_base, tmp_path)
    row = poison(run, value)
    before = [p.detach().clone() for p in run.peft_model.parameters() if p.requires_grad]
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        optimizer_step(run, 0)
    saved = json.loads((run.out / BAD_BATCH).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert saved["step"] == 1
    assert sorted(saved["rows_of_the_step"]) == list(range(1, 21))
    (bad,) = saved["rows"]
    assert bad["row"] == run.data.train_numbers[row] == NUMBER_OF_POISON
    assert tuple(bad["input_ids"]) == run.data.train[row].input_ids
    assert tuple(bad["labels"]) == run.data.train[row].labels
    assert "\N{SNOWMAN}" in bad["text"]
    assert bad["nll_nats"] == "nan"
    after = [p for p in run.peft_model.parameters() if p.requires_grad]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_gradient_that_is_not_finite_saves_the_whole_step(tiny_base: Path, tmp_path: Path):
    run = make_run(tiny_base, tmp_path)
    parameter = next(p for name, p in run.peft_model.named_parameters() if "lora_B" in name)
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match="gradient norm is"):
        optimizer_step(run, 0)
    saved = json.loads((run.out / BAD_BATCH).read_text())
    assert len(saved["rows"]) == 20
    assert all(isinstance(row["nll_nats"], float) for row in saved["rows"])


def test_row_numbers_are_those_of_the_file(tiny_base: Path, tmp_path: Path):
    config = small_config(tiny_base, tmp_path, data={"cutoff": 256})
    run = assemble(config, tmp_path / "run", tmp_path)
    raw = {row.number: row.value for row in read_file(Path(config.data.dataset))}
    assert len(run.data.train_numbers) == len(run.data.train) == 20
    for number, example in zip(run.data.train_numbers, run.data.train, strict=True):
        assert raw[number]["instruction"] in run.tokenizer.decode(list(example.input_ids))


def test_the_checkpoint_before_it_stays(tiny_base: Path, tmp_path: Path, monkeypatch):
    real = train_module.optimizer_step

    def step(run: Run, number: int) -> Any:
        if number == 4:
            with torch.no_grad():
                run.peft_model.get_input_embeddings().weight.fill_(float("nan"))
        return real(run, number)

    monkeypatch.setattr(train_module, "optimizer_step", step)
    config, out = small_config(tiny_base, tmp_path), tmp_path / "run"
    with pytest.raises(NonFiniteError, match="step 5"):
        train(config, out, tmp_path)
    kept = newest(out / "checkpoints")
    assert kept is not None
    assert kept.name == "step-000004"
    assert not (out / "adapter").exists()
    assert (out / BAD_BATCH).is_file()


def with_scaler(run: Run, scale: float, *, fused: bool = False) -> torch.amp.GradScaler:
    """Gives the run a real loss scaler, which on a CPU only a test asks for."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run.accelerator.scaler = scaler
    trained = [parameter for parameter in run.peft_model.parameters() if parameter.requires_grad]
    run.optimizer = AcceleratedOptimizer(torch.optim.AdamW(trained, fused=fused), scaler=scaler)
    return scaler


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused, as on a GPU"])
def test_an_fp16_overflow_skips_the_update_and_is_counted(tiny_base: Path, tmp_path: Path, capsys, fused: bool):
    run = make_run(tiny_base, tmp_path)
    scaler = with_scaler(run, 65536.0, fused=fused)
    parameter = next(p for name, p in run.peft_model.named_parameters() if "lora_B" in name)
    parameter.register_hook(lambda gradient: gradient * (float("inf") if scaler.get_scale() > 40000 else 1.0))
    before = parameter.detach().clone()
    record = optimizer_step(run, 0)
    assert (record.overflows, record.grad_norm) == (1, None)
    assert torch.equal(parameter, before)
    assert "step 1: fp16 overflow, no update; the loss scale is now 32768" in capsys.readouterr().err
    assert not (run.out / BAD_BATCH).exists()
    assert optimizer_step(run, 1).overflows == 0
    assert not torch.equal(parameter, before)


def test_an_overflow_that_scaling_does_not_cause_ends_the_run(tiny_base: Path, tmp_path: Path):
    run = make_run(tiny_base, tmp_path)
    with_scaler(run, 0.5)
    parameter = next(p for name, p in run.peft_model.named_parameters() if "lora_B" in name)
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match="gradient norm is nan"):
        optimizer_step(run, 0)
