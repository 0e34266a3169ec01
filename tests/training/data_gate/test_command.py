"""The `data` command: the report without training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.recipes import small_config
from training.__main__ import main
from training.config import resolved_toml


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(resolved_toml(small_config(tiny_base, tmp_path)))
    return "small.toml"


def test_data_writes_the_report_and_tells_its_summary(recipe: str, capsys):
    assert main(["data", recipe]) == 0
    out = capsys.readouterr().out
    assert "20 rows to train on, 4 held out" in out
    assert "whole report: runs/small/data_report.md" in out
    assert json.loads(Path("runs/small/data_report.json").read_text())["rows_train"] == 20
    assert [path.name for path in sorted(Path("runs/small").iterdir())] == ["data_report.json", "data_report.md"]


def test_data_takes_the_recipes_fields_and_its_refusals(recipe: str, capsys):
    assert main(["data", recipe, "--data.leakage", "fail", "--out", "elsewhere"]) == 2
    assert "data.leakage = 'fail' allows no training row" in capsys.readouterr().err
    assert not Path("elsewhere").exists()
    assert main(["data", recipe, "--data.leakage", "drop", "--out", "elsewhere"]) == 0
    assert Path("elsewhere/data_report.md").is_file()
