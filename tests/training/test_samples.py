"""Properties of samples: they change nothing of the run, are what the adapter answers, and survive a resume."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training.recipes import small_config
from training import train as train_module
from training.artifact import ADAPTER_WEIGHTS
from training.chat import Message, end_of_turn_id, render_prompt
from training.log import read_log
from training.model import load_tokenizer
from training.stop import TrainingStopped
from training.train import Start, train

PROMPTS = ["Explain lake and stars in 3 words.", "What is a ```fox```?"]


def sampled(base: Path, folder: Path, **run):
    run = {"sample_prompts": PROMPTS, "sample_tokens": 12, **run}
    return small_config(base, folder, lora={"dropout": 0.1}, optim={"neftune_alpha": 5.0}, run=run)


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_the_adapter_is_the_same_bytes_with_and_without_samples(tiny_base: Path, tmp_path: Path, capsys):
    files, nlls = [], []
    for prompts in (PROMPTS, []):
        config = sampled(tiny_base, tmp_path, sample_prompts=prompts, sample_every=1, sample_tokens=5)
        train(config, tmp_path / "run", tmp_path)
        files.append((tmp_path / "run" / "adapter" / ADAPTER_WEIGHTS).read_bytes())
        nlls.append([line.get("nll_nats") for line in read_log(tmp_path / "run" / "train_log.jsonl")])
        if prompts:
            assert [line["step"] for line in lines(tmp_path / "run")] == [step for step in range(7) for _ in PROMPTS]
    assert files[0] == files[1]
    assert nlls[0] == nlls[1]
    assert capsys.readouterr().err.count("samples after step") == 7
    assert not list((tmp_path / "run").glob("samples*")), "a run without prompts leaves no older run's samples"


def test_samples_come_with_each_validation_and_are_the_adapters_own_greedy_answers(tiny_base: Path, tmp_path: Path):
    out = tmp_path / "run"
    train(sampled(tiny_base, tmp_path), out, tmp_path)
    found = lines(out)
    assert [(line["step"], line["prompt"]) for line in found] == [(s, p) for s in (0, 3, 6) for p in PROMPTS]
    tokenizer = load_tokenizer(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(out / "adapter"))
    for line in found[-2:]:
        prompt = render_prompt(tokenizer, [Message("user", str(line["prompt"]))])
        answer = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12,
            do_sample=False, eos_token_id=end_of_turn_id(tokenizer),
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert line["completion"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert line["finished"] is (answer[-1] == end_of_turn_id(tokenizer))
    page = (out / "samples.md").read_text()
    assert page.count("## Prompt") == 2
    assert "````text\nWhat is a ```fox```?\n````" in page


def test_a_resumed_run_has_the_samples_of_an_uninterrupted_one(tiny_base: Path, tmp_path: Path, monkeypatch):
    config = sampled(tiny_base, tmp_path, sample_every=2)
    train(config, tmp_path / "whole", tmp_path)
    real = train_module.optimizer_step

    def step_then_stop(run, step):
        record = real(run, step)
        if step + 1 == 3:
            signals.append(15)
        return record

    signals: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "optimizer_step", step_then_stop)
        patch.setattr(train_module, "_anywhere", lambda run, here: bool(signals))
        with pytest.raises(TrainingStopped):
            train(config, tmp_path / "stopped", tmp_path)
    train(config, tmp_path / "stopped", tmp_path, Start.RESUME)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
