"""The command line of training, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.recipes import small_config
from training.__main__ import main
from training.artifact import read_certificate
from training.config import resolved_toml


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(resolved_toml(small_config(tiny_base, tmp_path)))
    return path


def test_train_merge_check_and_nothing_twice(recipe: Path, capsys):
    assert main(["train", str(recipe)]) == 0
    adapter = Path("runs/small/adapter")
    assert "adapter small@" in capsys.readouterr().out
    manifest = (adapter / "manifest.json").read_bytes()

    assert main(["train", str(recipe), "--if-changed"]) == 0
    assert "up to date" in capsys.readouterr().out
    assert (adapter / "manifest.json").read_bytes() == manifest

    assert main(["merge", str(adapter), "--rows", "3"]) == 0
    assert "passed" in capsys.readouterr().out
    assert read_certificate(Path("runs/small/merged")).passed
    assert main(["check", str(adapter), "--merged", "runs/small/merged"]) == 0
    assert main(["check", str(adapter), "--merged", "runs/small"]) == 1
    capsys.readouterr()
    assert main(["merge", str(adapter), "--if-changed"]) == 0
    assert "up to date" in capsys.readouterr().out

    assert main(["check", str(adapter)]) == 0
    assert "files match their hashes" in capsys.readouterr().out


def test_merge_compares_when_asked_and_knows_what_it_did(recipe: Path, capsys):
    main(["train", str(recipe), "--model.quantisation", "nf4", "--optim.max_steps", "3"])
    adapter, merged = "runs/small/adapter", Path("runs/small/merged")

    def merge(*words: str) -> str:
        capsys.readouterr()
        assert main(["merge", adapter, "--rows", "2", "--if-changed", *words]) == 0
        return capsys.readouterr().out

    assert "merged onto the plain base" in merge()
    compared = merge("--compare")
    assert "what was trained" in compared
    assert "merged on the dequantised base" in compared
    certificate = read_certificate(merged)
    assert (certificate.onto, len(certificate.comparison)) == ("plain", 5)
    for words in (["--compare"], ["--onto", "auto"], []):
        assert "up to date" in merge(*words)
    assert "merged onto the dequantised base" in merge("--onto", "dequantised")
    assert read_certificate(merged).onto == "dequantised"
    assert "NLL difference" in merge("--onto", "auto")


def test_a_changed_recipe_trains_again(recipe: Path, capsys):
    main(["train", str(recipe), "--optim.max_steps", "2"])
    first = json.loads(Path("runs/small/adapter/manifest.json").read_text())
    main(["train", str(recipe), "--if-changed", "--optim.max_steps", "3"])
    second = json.loads(Path("runs/small/adapter/manifest.json").read_text())
    assert (first["loss"]["steps"], second["loss"]["steps"]) == (2, 3)


def test_check_names_a_tampered_file_and_another_base(recipe: Path, tmp_path: Path, capsys):
    from tests.tiny import make_tiny_model

    main(["train", str(recipe), "--optim.max_steps", "1"])
    adapter = Path("runs/small/adapter")
    other = make_tiny_model(tmp_path / "other", seed=5)
    assert main(["check", str(adapter), "--base", str(other)]) == 1
    assert "not the base it was trained on" in capsys.readouterr().err
    (adapter / "tokenizer.json").write_text("{}")
    assert main(["check", str(adapter)]) == 2
    assert "tokenizer.json: changed since training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lora.rnk", "4"], "lora.rank"),
        (["--lora.rank", "0"], ">= 1"),
        (["--model.id", "no/such-model"], "model.id = 'no/such-model'"),
        (["--data.dataset", "missing.jsonl"], "missing.jsonl"),
        (["--data.held_out", "24"], "data.held_out = 24"),
        (["--lora.target_modules", '["nope"]'], "nope"),
        (["--lora.target_modules", '["q_proj", "lm_head"]'], "output head"),
        (["--lora.target_modules", '["embed_tokens"]'], "embedding"),
        (["--model.dtype", "float16"], "CUDA"),
        (["--optim.optimizer", "paged_adamw_8bit"], "CUDA"),
    ],
)
def test_bad_input_is_named_and_exits_2(recipe: Path, capsys, monkeypatch, words, told):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["train", str(recipe), *words]) == 2
    error = capsys.readouterr().err
    assert "\nerror: " in "\n" + error
    assert told in error
    assert "Traceback" not in error


def test_fields_may_come_before_the_recipe_or_without_one(recipe: Path, capsys):
    assert main(["train", "--lora.rank", "2", "--optim.max_steps=1", str(recipe)]) == 0
    manifest = json.loads(Path("runs/small/adapter/manifest.json").read_text())
    assert manifest["lora"]["rank"] == 2
    assert main(["train", "--lora.rank", "0"]) == 2
    assert "smollm2-starter.toml: lora.rank = 0" in capsys.readouterr().err


def test_an_unknown_recipe_lists_the_known_ones(capsys):
    assert main(["train", "smollm-starter"]) == 2
    assert "smollm2-starter" in capsys.readouterr().err


def test_preview_prints_what_is_trained(recipe: Path, capsys):
    assert main(["preview", str(recipe), "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- row") == 2
    assert "<|im_end|>]]" in out


def test_plan_prints_memory_tokens_and_time(recipe: Path, capsys):
    assert main(["plan", str(recipe), "--tokens-per-s", "100", "--optim.max_steps", "3"]) == 0
    out = capsys.readouterr().out
    for name in ("steps", "tokens", "weights (32 bit)", "adapter and optimizer", "predicted peak", "100 tokens/s"):
        assert name in out
    assert "3 of 8 rows" in out
    assert not Path("runs").exists()


def test_plan_probes_and_leaves_nothing(recipe: Path, capsys):
    assert main(["plan", str(recipe), "--probe", "2"]) == 0
    out = capsys.readouterr().out
    assert "peak of 2 probed steps" in out
    assert "peak, corrected" in out
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--probe", "-1"], "--probe -1"), (["--tokens-per-s", "0"], "above 0"), (["--tokens-per-s", "nan"], "above 0")],
)
def test_plan_refuses_what_cannot_be(recipe: Path, capsys, words, told):
    assert main(["plan", str(recipe), *words]) == 2
    assert told in capsys.readouterr().err
