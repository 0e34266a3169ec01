"""Properties of a sweep's runs: each is what `train` alone makes; finished ones are skipped, a failing one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.recipes import small_config
from training.__main__ import main
from training.artifact import ADAPTER_WEIGHTS, read_manifest
from training.config import resolved_toml
from training.sweep import runs as runs_module

OUT = Path("runs/small-sweep")
WORDS = ["--lora.rank", "2,4", "--optim.max_steps", "2", "--lora.target_modules"]


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(resolved_toml(small_config(tiny_base, tmp_path)))
    return "small.toml"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that were trained."""
    real, names = runs_module.train, []

    def train(config, *rest):
        names.append(config.run.name)
        return real(config, *rest)

    monkeypatch.setattr(runs_module, "train", train)
    return names


def test_a_sweep_ends_though_a_run_fails_and_repeats_only_what_is_not_done(recipe: str, trained: list[str], capsys):
    assert main(["sweep", recipe, *WORDS, 'all-linear,["nope"]']) == 1
    shown = capsys.readouterr()
    assert len(trained) == 4
    assert shown.err.count("failed, the next one follows: ModelError: lora.target_modules = ['nope']") == 2
    assert "sweep: run 2 of 4, about 0:" in shown.err
    document = json.loads((OUT / "sweep.json").read_text())
    done = [run for run in document["runs"] if run["status"] == "done"]
    assert [run["values"]["lora.rank"] for run in done] == ["2", "4"]
    assert done[1]["trainable_parameters"] == 2 * done[0]["trainable_parameters"] == 8192
    for run in done:
        manifest = read_manifest(OUT / run["folder"] / "adapter")
        assert run["nll_nats"] == manifest.loss.validation_last_nll_nats < run["nll_nats_before"]
        assert run["peak_gib"] > 0
        assert run["tokens_per_s"] > 0
    assert (OUT / "sweep.png").stat().st_size > 5000
    assert "(lowest)" in shown.out

    trained.clear()
    assert main(["sweep", recipe, *WORDS[:-1]]) == 0  # another name of the same values would be another run
    assert len(trained) == 2
    trained.clear()
    assert main(["sweep", recipe, *WORDS[:-1]]) == 0
    assert trained == []
    assert capsys.readouterr().err.count("is up to date") == 2

    alone = read_manifest(OUT / done[0]["folder"] / "adapter").recipe
    assert main(["train", recipe, "--lora.rank", "2", "--optim.max_steps", "2"]) == 0
    assert alone == json.loads(Path("runs/small/adapter/manifest.json").read_text())["recipe"] | {"run": alone["run"]}
    files = [folder / "adapter" / ADAPTER_WEIGHTS for folder in (OUT / done[0]["folder"], Path("runs/small"))]
    assert files[0].read_bytes() == files[1].read_bytes()
