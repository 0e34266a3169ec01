"""Holds the starter set to its house style and its split to having no leaks."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from training.config import load_recipe
from training.data import load_dataset
from training.sources import STARTER
from training.split import near_duplicates, split_held_out

ROWS: list[dict[str, Any]] = [json.loads(line) for line in STARTER.read_text(encoding="utf-8").splitlines()]
CHINESE = re.compile(r"[\u4e00-\u9fff]")
FENCE = re.compile(r"```\w*\n(.*?)\n```", re.DOTALL)
DETAIL = re.compile(r"- \S|\d\. \S")


def is_chinese(row: dict[str, Any]) -> bool:
    return bool(CHINESE.search(row["output"]))


def test_there_are_enough_rows_of_one_shape():
    assert len(ROWS) >= 400
    assert {tuple(row) for row in ROWS} == {("instruction", "input", "output")}
    assert 5 <= sum(map(is_chinese, ROWS)) <= len(ROWS) // 5
    assert sum("```" in row["output"] for row in ROWS) >= 10
    assert sum(bool(row["input"]) for row in ROWS) >= 100


@pytest.mark.parametrize("row", ROWS, ids=[f"row{number}" for number in range(1, len(ROWS) + 1)])
def test_a_row_keeps_the_house_style(row: dict[str, Any]):
    output, chinese = row["output"], is_chinese(row)
    assert output == output.strip()
    assert not re.search(r"\*\*|^#", FENCE.sub("", output), re.MULTILINE)
    first, *details, last = output.split("\n\n")
    assert "\n" not in first, "one sentence answers first"
    assert not first.startswith(("- ", "1. ", "```", "Sure"))
    assert last.startswith(("例如：", "注意：") if chinese else ("Example: ", "Caveat: "))
    assert "\n" not in last
    block = "\n\n".join(details)
    lines = [line for line in FENCE.sub("", block).split("\n") if line]
    assert all(DETAIL.match(line) for line in lines), lines
    code = [line for body in FENCE.findall(block) for line in body.split("\n")]
    assert 2 <= len(lines) <= 6 or code
    assert len(code) <= 10
    assert 50 <= len(output) <= 150 if chinese else 25 <= len(output.split()) <= 100


def test_no_instruction_stands_twice():
    asked = [(row["instruction"].casefold(), row["input"]) for row in ROWS]
    assert len(set(asked)) == len(ROWS)


def test_no_held_out_row_is_nearly_in_the_training_rows():
    config = load_recipe("smollm2-starter").data
    dataset = load_dataset(config)
    assert dataset.problems == ()
    train, held_out = split_held_out(dataset.conversations, config.held_out)
    assert (len(train), len(held_out)) == (len(ROWS) - 100, 100)
    assert [str(pair) for pair in near_duplicates(train, held_out, threshold=0.4)] == []
    assert near_duplicates([*train, held_out[7]], held_out, threshold=0.4), "the measure would find a copy"
