"""Properties of the data report: each trouble is counted once, by hand, and named with its rows."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tokenizer
from training.config import TrainConfig
from training.data_gate.report import DataReport, Finding, build_report
from training.prepare import prepare

GOOD = [
    {
        "instruction": f"Tell of {word} and nothing but {word}.",
        "output": f"Well, {word} is {word}, said the {word} man.",
    }
    for word in "sun moon star lake hill tree fish bird road wind".split()  # noqa: SIM905
]
FOX = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all"


def report(folder: Path, rows: list[Any], **data: object) -> DataReport:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    sections = {"model": {"id": "x"}, "data": {"dataset": str(path), "held_out": 0, **data}, "run": {"name": "x"}}
    config = TrainConfig.model_validate({**sections, "optim": {"batch_size": 4, "micro_batch_tokens": 2000}})
    tokenizer = make_tokenizer()
    found = prepare(tokenizer, config.data, 0, report=partial(build_report, tokenizer=tokenizer, config=config)).report
    assert found is not None
    return found


def finding(found: DataReport, name: str) -> Finding:
    (one,) = [finding for finding in found.findings if name in finding.name]
    return one


def test_good_rows_give_no_warning(tmp_path: Path):
    found = report(tmp_path, GOOD)
    assert (found.rows_read, found.rows_train, found.rows_held_out, found.rows_dropped) == (10, 10, 0, 0)
    assert [f.name for f in found.findings if f.warning or f.rows] == []
    assert (found.prompt_scripts, found.reply_scripts) == ({"Latin": 10}, {"Latin": 10})


BAD: list[tuple[str, list[Any], int, str]] = [
    ("rejected", [GOOD[0] | {"output": ""}, GOOD[0] | {"output": None}, "{torn"], 3, "1 x output: is empty"),
    ("exact duplicates", [GOOD[2] | {"output": GOOD[2]["output"].upper()}], 1, "row 11 of row 3"),
    ("near duplicates", [
        {"instruction": "Say it.", "output": FOX + "."}, {"instruction": "Say it.", "output": FOX + " now."},
    ], 1, "row 12 of row 11 (78%)"),
    ("one prompt with different replies", [{"instruction": GOOD[4]["instruction"], "output": "No."}], 2, "rows 5, 11"),
    ("without a word", [{"instruction": "Go on.", "output": "..."}], 1, "row 11 (line 11)"),
    ("mid-sentence", [{"instruction": "Go on.", "output": FOX}], 1, "row 11 (line 11)"),
    ("cut at data.cutoff", [{"instruction": "Go on.", "output": FOX * 90 + "."}], 1, "row 11 (line 11)"),
    ("control tokens", [{"instruction": "What is <|im_end|>?", "output": "A token."}], 1, "row 11 (line 11)"),
    ("control tokens", [{"instruction": "What is <|eot_id|>?", "output": "A token."}], 1, "row 11 (line 11)"),
    ("different scripts", [{"instruction": "Translate: hill.", "output": "山。"}], 1, "row 11 (line 11)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "count", "shown"), BAD, ids=[f"{at} {bad[0]}" for at, bad in enumerate(BAD)])
def test_each_trouble_is_found_and_named(tmp_path: Path, name: str, rows: list[Any], count: int, shown: str):
    found = finding(report(tmp_path, [*GOOD, *rows]), name)
    assert found.rows == count
    assert shown in found.examples
    assert found.warning is (name != "different scripts")


def test_no_more_than_twenty_rows_are_named(tmp_path: Path):
    rows = [{"instruction": f"Go {number}.", "output": "..."} for number in range(30)]
    found = finding(report(tmp_path, rows), "without a word")
    assert (found.rows, len(found.examples), found.share) == (30, 20, 1.0)


def test_leaks_are_counted_by_row_and_are_a_warning_where_they_stay(tmp_path: Path):
    reply = "Gluten relaxes in that time, so the dough rolls out without springing back."
    rows = [*GOOD, *({"instruction": f"Why rest dough {word}?", "output": reply} for word in ("now", "long", "first"))]
    for policy, dropped in (("report", 0), ("drop", 2)):
        found = report(tmp_path, rows, held_out=6, leakage=policy)
        leaks = finding(found, "held-out row exactly")
        assert found.rows_dropped == dropped
        assert found.rows_train == 7 - dropped
        assert leaks.rows == 2
        assert leaks.warning is (policy == "report")
        assert "100% of held-out row" in leaks.examples[0]


def test_tokens_are_those_that_are_trained_on(tmp_path: Path):
    found = report(tmp_path, [*GOOD, GOOD[0] | {"output": FOX * 90 + "."}])
    tokens = found.tokens
    assert tokens.lost > 0
    assert tokens.total == round(11 * (found.prompt_tokens.mean + found.reply_tokens.mean))
    assert tokens.labelled == round(11 * found.reply_tokens.mean)
    assert tokens.pack_mean == tokens.total / tokens.packs
    assert tokens.padded > tokens.total  # eleven rows in batches of four, one of them long
