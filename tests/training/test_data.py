"""Properties of a data set: its layout found, bad rows left out and reported, the rest rendered as the recipe says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.tiny import make_tokenizer
from training.chat import IGNORED_LABEL, QWEN_SYSTEM_PROMPT
from training.config import DataConfig
from training.data import load_dataset, render_conversation, row_report
from training.rows import DataError

GOOD = {"instruction": "Say hi.", "input": "", "output": "hi"}


def written(tmp_path: Path, rows: Sequence[object], **options: object) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return DataConfig.model_validate({"dataset": str(path), **options})


def test_bad_rows_are_left_out_and_reported_by_line_field_and_reason(tmp_path: Path):
    dataset = load_dataset(written(tmp_path, [GOOD, "{torn", GOOD | {"output": ""}, GOOD]))
    assert [row.line for row in dataset.conversations] == [1, 4]
    assert [(problem.line, problem.field) for problem in dataset.problems] == [(2, "row"), (3, "output")]
    head, *lines = row_report(dataset).splitlines()
    assert head.endswith("rows.jsonl: 4 rows, 2 used, 2 rejected")
    assert lines[0].startswith("  row 2 (line 2): row: is not JSON: ")
    assert lines[1] == "  row 3 (line 3): output: is empty"


def test_strict_allows_no_bad_row(tmp_path: Path):
    assert len(load_dataset(written(tmp_path, [GOOD, GOOD], strict=True)).conversations) == 2
    with pytest.raises(DataError, match=r"(?s)row 2 \(line 2\): row: is a list.*data\.strict"):
        load_dataset(written(tmp_path, [GOOD, []], strict=True))


def test_a_long_report_counts_what_it_does_not_list(tmp_path: Path):
    bad = (
        [GOOD | {"output": ""}] * 12 + [GOOD | {"output": 3}] * 5 + [GOOD | {f"{i}": 1, "instruction": i} for i in [1]]
    )
    lines = row_report(load_dataset(written(tmp_path, [GOOD, *bad]))).splitlines()
    assert len(lines) == 1 + 10 + 3
    assert lines[11:] == [
        "  and 5 more: output: is a number, not text",
        "  and 2 more: output: is empty",
        "  and 1 more: instruction: is a number, not text",
    ]


def test_a_report_stays_short_whatever_the_kinds(tmp_path: Path):
    bad = [{"messages": [{"role": f"r{number}", "content": "x"}]} for number in range(40)]
    good = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    lines = row_report(load_dataset(written(tmp_path, [good, *bad]))).splitlines()
    assert len(lines) == 1 + 10 + 10 + 1
    assert lines[-1] == "  and 20 more of other kinds"


@pytest.mark.parametrize("rows", [[], [[]], [{"text": "x"}], [GOOD | {"output": ""}]])
def test_a_data_set_without_a_valid_row_is_refused(tmp_path: Path, rows: list[object]):
    with pytest.raises(DataError, match="no row is left to train on"):
        load_dataset(written(tmp_path, rows))


def test_rows_before_the_first_that_tells_the_layout_are_checked_too(tmp_path: Path):
    dataset = load_dataset(written(tmp_path, ["{torn", [], {"output": "hi"}, GOOD]))
    assert [problem.field for problem in dataset.problems] == ["row", "row", "instruction"]
    assert len(dataset.conversations) == 1


def test_rows_of_another_format_than_the_first_are_reported_not_guessed_one_by_one(tmp_path: Path):
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    dataset = load_dataset(written(tmp_path, [GOOD, chat, {"text": "x"}, GOOD | {"extra": [1]}, {"prompt": "x"}]))
    assert [row.line for row in dataset.conversations] == [1, 4]
    assert [(p.line, p.field, p.reason) for p in dataset.problems] == [
        (line, "instruction", "is missing") for line in (2, 3, 5)
    ]


def test_an_explicit_format_is_not_guessed(tmp_path: Path):
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]} | GOOD
    assert load_dataset(written(tmp_path, [row])).conversations[0].prompt_text == "x"
    assert load_dataset(written(tmp_path, [row], format="alpaca")).conversations[0].prompt_text == "Say hi."


def test_the_model_mode_renders_the_models_template_and_qwen_mode_llama_factorys(tmp_path: Path):
    tokenizer = make_tokenizer()
    (conversation,) = load_dataset(written(tmp_path, [GOOD])).conversations
    texts = {}
    for template in ("model", "qwen"):
        example = render_conversation(tokenizer, conversation, template, None)
        trained = [label for label in example.labels if label != IGNORED_LABEL]
        texts[template] = (tokenizer.decode(example.input_ids), tokenizer.decode(trained))
    assert "You are a helpful assistant.<|im_end|>" in texts["model"][0]
    assert texts["model"][1] == "hi<|im_end|>"
    assert texts["qwen"][0].startswith(f"<|im_start|>system\n{QWEN_SYSTEM_PROMPT}<|im_end|>\n")
    assert texts["qwen"][1] == "hi<|im_end|>\n"


def test_a_long_row_is_cut_to_the_cutoff(tmp_path: Path):
    (conversation,) = load_dataset(written(tmp_path, [GOOD | {"output": "the lazy dog " * 90}])).conversations
    example = render_conversation(make_tokenizer(), conversation, "model", 80)
    assert len(example.input_ids) <= 80
    assert example.lost_tokens > 0
