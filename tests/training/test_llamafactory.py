"""LLaMA-Factory's recipes: each argument is mapped, or named as having no equivalent; none is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.recipes import write_rows
from training.__main__ import main
from training.config import ConfigError, TrainConfig, load_recipe
from training.llamafactory import LlamaFactoryError, map_arguments

YAML = """\
### model
model_name_or_path: Qwen/Qwen2-7B-Instruct
quantization_bit: 4
### method
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.05
loraplus_lr_ratio: 16.0
### dataset
dataset: alpaca_gpt4_en
template: qwen
cutoff_len: 1024
max_samples: 500
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/qwen2-7b/lora/sft
logging_steps: 10
save_steps: 100
plot_loss: true
overwrite_output_dir: true
### train
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
learning_rate: 5e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.03
max_grad_norm: 1.0
fp16: true
"""
ARGUMENTS: dict[str, Any] = dict(  # noqa: C408  the notebook's form
    stage="sft",
    do_train=True,
    model_name_or_path="Qwen/Qwen2-7B-Instruct",
    dataset="alpaca_gpt4_en",
    template="qwen",
    finetuning_type="lora",
    lora_target="all",
    lora_dropout=0.05,
    output_dir="qwen2_lora",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    lr_scheduler_type="cosine",
    logging_steps=10,
    warmup_ratio=0.03,
    save_steps=100,
    learning_rate=5e-5,
    num_train_epochs=3.0,
    max_samples=500,
    max_grad_norm=1.0,
    loraplus_lr_ratio=16.0,
    quantization_bit=4,
    cutoff_len=1024,
    fp16=True,
    report_to="none",
)


def check_numbers(config: TrainConfig) -> None:
    assert (config.model.id, config.model.quantisation) == ("Qwen/Qwen2-7B-Instruct", "nf4")
    assert config.model.dtype == "float16"
    assert (config.data.dataset, config.data.template) == ("llamafactory/alpaca_gpt4_en", "qwen")
    assert (config.data.cutoff, config.data.limit, config.data.held_out) == (1024, 500, 100)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16.0, 0.05)
    assert config.lora.target_modules == "all-linear"
    assert (config.optim.learning_rate, config.optim.schedule, config.optim.warmup_ratio) == (5e-5, "cosine", 0.03)
    assert (config.optim.epochs, config.optim.batch_size, config.optim.micro_batch_tokens) == (3, 16, 4096)
    assert (config.run.log_every, config.run.save_every, config.run.trackers) == (10, 100, ())


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def test_the_yaml_and_the_dictionary_are_the_same_recipe(capsys):
    Path("train.yaml").write_text(YAML)
    Path("train.json").write_text(json.dumps(ARGUMENTS))
    from_yaml, from_json = load_recipe("train.yaml"), load_recipe("train.json")
    check_numbers(from_yaml)
    check_numbers(from_json)
    assert (from_yaml.run.name, from_json.run.name) == ("sft", "qwen2_lora")
    told = capsys.readouterr().err
    assert "loraplus_lr_ratio = 16.0: no equivalent, left out" in told
    assert "plot_loss = True: not needed: loss.png" in told
    assert "4 rows x 4 accumulations: 16 rows" in told
    assert "--out DIR" in told


def test_overrides_go_on_top():
    Path("train.yaml").write_text(YAML)
    config = load_recipe("train.yaml", ["--model.dtype", "auto", "--lora.rank", "4"])
    assert (config.model.dtype, config.lora.rank, config.lora.alpha) == ("auto", 4, 16.0)


def test_what_is_left_out_takes_llama_factorys_default():
    sections, _ = map_arguments({"model_name_or_path": "m", "dataset": "alpaca_en", "output_dir": "o"})
    config = TrainConfig.model_validate(sections)
    assert (config.model.quantisation, config.model.dtype) == ("none", "auto")
    assert (config.data.cutoff, config.data.template) == (2048, "model")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16.0, 0.0)
    assert (config.optim.schedule, config.optim.warmup_ratio, config.optim.batch_size) == ("linear", 0.0, 8)
    assert (config.run.log_every, config.run.save_every, config.run.eval_every) == (500, 500, 500)


def mapped(**changes: Any) -> tuple[TrainConfig, list[str]]:
    sections, notes = map_arguments({**ARGUMENTS, **changes})
    return TrainConfig.model_validate(sections), notes


@pytest.mark.parametrize(
    ("changes", "section", "field", "value"),
    [
        ({"lora_alpha": None, "lora_rank": 32}, "lora", "alpha", 64.0),
        ({"lora_target": "q_proj, v_proj"}, "lora", "target_modules", ("q_proj", "v_proj")),
        ({"use_rslora": True}, "lora", "rslora", True),
        ({"use_dora": True}, "lora", "dora", True),
        ({"quantization_bit": None}, "model", "quantisation", "none"),
        ({"bf16": True, "fp16": False}, "model", "dtype", "bfloat16"),
        ({"learning_rate": "1e-4"}, "optim", "learning_rate", 1e-4),
        ({"lr_scheduler_type": "constant"}, "optim", "warmup_ratio", 0.0),
        ({"lr_scheduler_type": "constant_with_warmup"}, "optim", "schedule", "constant"),
        ({"max_steps": 50}, "optim", "max_steps", 50),
        ({"max_steps": 50, "warmup_ratio": 0, "warmup_steps": 5}, "optim", "warmup_ratio", 0.1),
        ({"warmup_ratio": None, "warmup_steps": 0.2}, "optim", "warmup_ratio", 0.2),
        ({"optim": "paged_adamw_8bit"}, "optim", "optimizer", "paged_adamw_8bit"),
        ({"neftune_noise_alpha": 5}, "optim", "neftune_alpha", 5),
        ({"mask_history": True}, "data", "turns", "last"),
        ({"mask_history": False}, "data", "turns", "all"),
        ({"val_size": 40}, "data", "held_out", 40),
        ({"val_size": 0.1}, "data", "held_out", 50),
        ({"early_stopping_steps": 3}, "run", "early_stopping_patience", 3),
        ({"report_to": ["tensorboard"]}, "run", "trackers", ("tensorboard",)),
        ({"report_to": "tensorboard"}, "run", "trackers", ("tensorboard",)),
        ({"disable_gradient_checkpointing": True}, "run", "gradient_checkpointing", "off"),
        ({"eval_steps": 7}, "run", "eval_every", 7),
        ({"save_total_limit": 5}, "run", "keep_checkpoints", 5),
        ({"output_dir": "saves/a b/"}, "run", "name", "a-b"),
        ({"output_dir": "base"}, "run", "name", "llamafactory"),
    ],
)
def test_an_argument_sets_its_field(changes: dict[str, Any], section: str, field: str, value: object):
    config, _ = mapped(**changes)
    assert getattr(getattr(config, section), field) == value


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stage": "dpo"}, "stage = 'dpo' has no equivalent; give sft"),
        ({"finetuning_type": "full"}, "finetuning_type = 'full'"),
        ({"do_train": False}, "do_train = False"),
        ({"quantization_bit": 8}, "quantization_bit = 8 has no equivalent; give 4"),
        ({"lr_scheduler_type": "polynomial"}, "cosine or linear"),
        ({"num_train_epochs": 1.5}, "num_train_epochs = 1.5: give a whole number, or max_steps"),
        ({"dataset": "a,b"}, "one data set"),
        ({"dataset": None}, "one data set"),
        ({"dataset": "mine"}, "set dataset_dir"),
        ({"dataset_dir": "nowhere"}, "dataset_info.json"),
        ({"per_device_train_batch_size": "four"}, "per_device_train_batch_size = 'four': give a number"),
    ],
)
def test_another_experiment_is_refused_by_argument_and_value(changes: dict[str, Any], says: str):
    with pytest.raises(LlamaFactoryError) as caught:
        mapped(**changes)
    assert says in str(caught.value)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{3}[a-z_]{3,12}", fullmatch=True),
        st.one_of(st.booleans(), st.integers(), st.text()),
        max_size=4,
    )
)
def test_no_unknown_argument_vanishes(extra: dict[str, Any]):
    unknown = {f"x_{key}": value for key, value in extra.items()}
    _, notes = mapped(**unknown)
    for key in unknown:
        assert sum(note.startswith(f"{key} = ") for note in notes) == 1


def test_a_misspelt_argument_is_named_with_the_nearest_known():
    _, notes = mapped(learning_rat=1e-3)
    assert any("learning_rat = 0.001: no equivalent, left out; did you mean learning_rate?" in note for note in notes)


@pytest.mark.parametrize("template", ["llama3", "default", "chatml"])
def test_another_template_is_the_models_own_and_said_so(template: str):
    config, notes = mapped(template=template)
    assert config.data.template == "model"
    assert any(note.startswith(f"template = {template!r}: the model's own") for note in notes)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "a: [", "not YAML"),
        ("a.yaml", "- a", "no table of arguments"),
        ("a.json", "{", "not JSON"),
        ("a.yaml", "stage: dpo", "a.yaml: stage = 'dpo'"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(name: str, text: str, says: str):
    Path(name).write_text(text)
    with pytest.raises(LlamaFactoryError) as caught:
        load_recipe(name)
    assert says in str(caught.value)


def test_a_value_out_of_range_is_named_by_the_field_it_became():
    Path("a.json").write_text(json.dumps({**ARGUMENTS, "lora_rank": 0}))
    with pytest.raises(ConfigError, match=r"lora\.rank = 0"):
        load_recipe("a.json")


def test_a_yaml_recipe_trains(tiny_base: Path, capsys):
    Path("data").mkdir()
    write_rows(Path("data/rows.jsonl"))
    Path("data/dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.jsonl"}}))
    changes = {
        "model_name_or_path": str(tiny_base),
        "dataset": "mine",
        "template": "chatml",
        "cutoff_len": 64,
        "val_size": 4,
        "max_steps": 2,
        "max_samples": None,
    }
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in {**ARGUMENTS, "fp16": False, **changes}.items())
    Path("train.yaml").write_text(text)
    assert main(["train", "train.yaml"]) == 0
    out = capsys.readouterr()
    assert "adapter qwen2_lora@" in out.out
    assert "loraplus_lr_ratio = 16.0: no equivalent" in out.err
    recipe = json.loads(Path("runs/qwen2_lora/adapter/manifest.json").read_text())["recipe"]
    assert recipe["data"]["dataset_info"] == "data/dataset_info.json"
