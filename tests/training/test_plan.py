"""The plan of a run: its counts are the run's own, and its memory is what a fresh process then measures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tokenizer
from tests.training.recipes import small_config
from training.config import TrainConfig, resolved_toml
from training.log import read_log
from training.model import load_tokenizer
from training.plan import count_work, make_plan, table
from training.prepare import prepare
from training.samples import prompts_of
from training.train import train

ROOT = Path(__file__).resolve().parent.parent.parent
TOLERANCE = 0.15  # of the predicted peak, before any probe, where the runtime is most of it
LARGER_TOLERANCE = 0.3  # where tensors are


def test_steps_and_tokens_are_those_of_the_run(tiny_base: Path, tmp_path: Path):
    config = small_config(tiny_base, tmp_path)
    data = prepare(load_tokenizer(tiny_base), config.data, config.run.eval_rows)
    work = count_work(config, data)
    train(config, tmp_path / "run", tmp_path)
    log = read_log(tmp_path / "run" / "train_log.jsonl")
    records = [line for line in log if "nll_nats" in line]
    assert work.steps == len(records)
    assert work.tokens == sum(record["tokens"] for record in records)
    assert work.labelled == sum(record["labelled_tokens"] for record in records)
    assert work.validations == len(log) - len(records)
    assert work.validation_tokens == sum(len(example.input_ids) for example in data.validation)


@pytest.mark.parametrize(("budget", "fits"), [(64, True), (100, True), (100_000, False)])
def test_the_largest_pack_is_within_the_budget_and_a_step(tiny_base: Path, tmp_path: Path, budget: int, fits: bool):
    config = small_config(tiny_base, tmp_path, optim={"micro_batch_tokens": budget})
    data = prepare(load_tokenizer(tiny_base), config.data, config.run.eval_rows)
    work = count_work(config, data)
    assert (work.largest_pack == budget) == fits
    assert work.largest_pack <= work.tokens


def test_nothing_is_loaded_without_a_probe(tiny_base: Path, tmp_path: Path):
    """The weight file may end after its header."""
    for path in tiny_base.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            content = content[: 8 + int.from_bytes(content[:8], "little")]
        (tmp_path / path.name).write_bytes(content)
    config = small_config(tmp_path, tmp_path)
    assert make_plan(config, tmp_path, "cpu").peak_gib == pytest.approx(
        make_plan(small_config(tiny_base, tmp_path), tmp_path, "cpu").peak_gib, rel=0.1
    )


def test_hours_follow_the_given_rate(tiny_base: Path, tmp_path: Path):
    config = small_config(tiny_base, tmp_path)
    slow, fast = (make_plan(config, tmp_path, "cpu", tokens_per_s=rate) for rate in (10.0, 20.0))
    assert slow.hours == 2 * fast.hours
    expected = (slow.work.tokens + slow.work.validations * slow.work.validation_tokens / 2) / 10
    assert slow.hours * 3600 == pytest.approx(expected)
    assert "at 10 tokens/s, given" in table(slow, config)
    assert "--probe STEPS" in table(make_plan(config, tmp_path, "cpu"), config)


def test_samples_are_counted_as_the_run_takes_them(tiny_base: Path, tmp_path: Path):
    run = {"sample_prompts": ["Explain lake.", "What is a fox?"], "sample_tokens": 5, "sample_every": 2}
    config = small_config(tiny_base, tmp_path, run=run)
    lengths = [len(prompt) for prompt in prompts_of(config, load_tokenizer(tiny_base))]
    plan = make_plan(config, tmp_path, "cpu", tokens_per_s=10.0)
    train(config, tmp_path / "run", tmp_path)
    taken = {line["step"] for line in read_log(tmp_path / "run" / "samples.jsonl")}
    assert plan.work.samplings == len(taken) == 4
    assert plan.work.largest_sampled == sum(lengths) + 2 * 4
    assert plan.work.sampled_tokens == sum(sum(length + new for new in range(5)) for length in lengths)
    without = make_plan(small_config(tiny_base, tmp_path), tmp_path, "cpu", tokens_per_s=10.0)
    assert without.work.samplings == without.samplings_s == without.memory.sampling == 0
    assert (plan.hours - without.hours) * 3600 == pytest.approx(4 * plan.work.sampled_tokens / 2 / 10)
    assert "samples, in that" in table(plan, config)


def test_a_gpu_is_planned_for_from_anywhere(tiny_base: Path, tmp_path: Path):
    config = small_config(tiny_base, tmp_path, model={"dtype": "float16"})
    plan = make_plan(config, tmp_path, "cuda")
    assert plan.memory.runtime == 0
    assert plan.place.number_bytes == 2
    assert not plan.place.dense
    nf4 = {"dtype": "float16", "quantisation": "nf4", "keep_dense": "on"}
    assert make_plan(small_config(tiny_base, tmp_path, model=nf4), tmp_path, "cuda").place.dense


def command(folder: Path, config: TrainConfig, name: str, *words: str) -> str:
    """Runs the command in a fresh process, whose peak is its own, and returns its output."""
    recipe = folder / "recipe.toml"
    recipe.write_text(resolved_toml(config))
    done = subprocess.run(
        [sys.executable, "-m", "training", name, str(recipe), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def probe(folder: Path, config: TrainConfig, steps: int) -> dict[str, str]:
    lines = command(folder, config, "plan", "--probe", str(steps)).splitlines()
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)


def gib(value: str) -> float:
    return float(value.removesuffix(" GiB"))


def check(found: dict[str, str], steps: int, tolerance: float) -> None:
    predicted, measured = gib(found["predicted peak"]), gib(found[f"peak of {steps} probed steps"])
    assert predicted == pytest.approx(measured, rel=tolerance), found
    assert "tokens/s, probed" in found["time"]


def test_the_prediction_is_near_what_a_probe_measures(tiny_base: Path, tmp_path: Path):
    check(probe(tmp_path, small_config(tiny_base, tmp_path), 3), 3, TOLERANCE)


def make_smollm2_shape(directory: Path, layers: int) -> Path:
    """Writes random weights in the shape of SmolLM2-135M, with the tiny tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_the_prediction_holds_in_smollm2s_shape(tmp_path: Path):
    base = make_smollm2_shape(tmp_path / "base", layers=30)
    config = small_config(base, tmp_path, optim={"micro_batch_tokens": 512, "batch_size": 16, "epochs": 1})
    check(probe(tmp_path, config, 1), 1, LARGER_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"dora": True, "dropout": 0.1}, "model": {"quantisation": "nf4"}},
        {"run": {"sample_prompts": ["walk " * 500] * 4, "sample_tokens": 1}},
    ],
    ids=["dora", "samples"],
)
def test_the_prediction_holds_with_dora_and_with_samples(tmp_path: Path, sections: dict[str, Any]):
    """The samples' prompts are far longer than the packs, so that their passes are the peak."""
    base = make_smollm2_shape(tmp_path / "base", layers=4)
    config = small_config(base, tmp_path, optim={"micro_batch_tokens": 256, "batch_size": 4, "epochs": 1}, **sections)
    check(probe(tmp_path, config, 1), 1, TOLERANCE)


@pytest.mark.slow
def test_the_plan_after_a_probe_is_within_a_tenth_of_a_longer_runs_peak(tmp_path: Path):
    """The run validates, saves and plots too, and its later steps may hold larger packs than those probed."""
    base = make_smollm2_shape(tmp_path / "base", layers=4)
    config = small_config(base, tmp_path, optim={"micro_batch_tokens": 256, "epochs": 3})
    planned = gib(probe(tmp_path, config, 2)["peak, corrected"])
    command(tmp_path, config, "train", "--out", "run")
    records = [line for line in read_log(tmp_path / "run" / "train_log.jsonl") if "nll_nats" in line]
    assert len(records) == 9
    assert planned == pytest.approx(max(record["peak_gib"] for record in records), rel=0.1)
