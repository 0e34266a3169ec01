"""Properties of preparing data: what leaks into the held-out rows is left out, told or refused, as the recipe says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import make_tokenizer
from training.config import DataConfig, load_recipe
from training.prepare import prepare
from training.rows import DataError

REPLY = "Gluten relaxes in that time, so the dough rolls out without springing back."


def recipe(folder: Path, **data: object) -> DataConfig:
    path = folder / "rows.jsonl"
    rows = [{"instruction": f"Number {number}?", "output": f"It is the number {number}."} for number in range(20)]
    rows += [{"instruction": f"Why rest dough {word}?", "output": REPLY} for word in ("now", "long", "first")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig.model_validate({"dataset": str(path), "held_out": 10, **data})


def test_training_rows_that_leak_are_left_out_and_the_held_out_rows_stay(tmp_path: Path, capsys):
    told = prepare(make_tokenizer(), recipe(tmp_path, leakage="report"), 4)
    assert "warning: 2 training rows repeat a held-out row and flatter the evaluation" in capsys.readouterr().err
    kept = prepare(make_tokenizer(), recipe(tmp_path), 4)
    assert "2 training rows repeat a held-out row and are left out:" in capsys.readouterr().err
    assert kept.held_out == told.held_out
    assert (told.facts.rows_train, kept.facts.rows_train, len(kept.train)) == (13, 11, 11)
    assert set(told.train_numbers) - set(kept.train_numbers) < {21, 22, 23}
    assert kept.facts.split_rule.endswith("; 2 training rows left out that repeat one of them")
    assert told.facts.sha256 == kept.facts.sha256


def test_a_recipe_may_refuse_leakage(tmp_path: Path):
    with pytest.raises(DataError, match=r"(?s)data\.leakage = 'fail'.*there are 2:.*100% of held-out row.*'drop'"):
        prepare(make_tokenizer(), recipe(tmp_path, leakage="fail"), 4)
    assert len(prepare(make_tokenizer(), recipe(tmp_path, leakage="fail", limit=20), 4).train) == 10


def test_a_data_set_of_nothing_but_leaks_is_refused(tmp_path: Path):
    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"Why {n}?", "output": REPLY}) + "\n" for n in range(4)))
    with pytest.raises(DataError, match="each of the 2 training rows"):
        prepare(make_tokenizer(), DataConfig(dataset=str(path), held_out=2), 0)


def test_the_starter_split_leaks_nothing_so_no_row_is_left_out(capsys):
    prepared = prepare(make_tokenizer(), load_recipe("smollm2-starter").data, 0)
    assert (prepared.facts.rows_train, prepared.facts.rows_held_out) == (380, 100)
    assert prepared.facts.split_rule.endswith("stay together")
    assert "repeat" not in capsys.readouterr().err
