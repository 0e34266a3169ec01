"""Properties of reading rows: every file format gives the same rows; torn files never pass for whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from training.config import DataConfig
from training.rows import ALPACA, OPENAI, DataError, Row, RowProblem
from training.sources import STARTER, load_rows, read_file

ROWS: list[dict[str, Any]] = [
    {"instruction": "Say hi.\n\u2028", "input": "", "output": "hi [, ] {"},
    {"instruction": "说你好。", "input": "x", "output": "你好\\"},
    {"instruction": "a", "input": "b", "output": "🦊"},
]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def values(path: Path) -> list[object]:
    rows = list(read_file(path))
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.value for row in rows if isinstance(row, Row)]


LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("a.json", "\ufeff \n" + json.dumps(ROWS)),
        ("a.json", LINES),
        ("a.jsonl", LINES + "\n"),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n") + "\n\n"),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, text: str):
    assert values(written(tmp_path / name, text)) == ROWS


def test_parquet_gives_the_same_rows(tmp_path: Path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == ROWS


def test_a_row_knows_its_line(tmp_path: Path):
    lines = written(tmp_path / "a.jsonl", "\n" + LINES.replace("\n", "\n\n"))
    assert [row.line for row in read_file(lines)] == [2, 4, 6]
    array = written(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    assert [row.line for row in read_file(array)] == [2, 7, 12]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"instruction": "a", "outp', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a": 1} {"a": 2}', "Extra data"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_that_rows_problem_alone(tmp_path: Path, line: bytes, reason: str):
    good = json.dumps(ROWS[0]).encode()
    rows = list(read_file(written(tmp_path / "a.jsonl", good + b"\n\n" + line + b"\n" + good)))
    assert [type(row) for row in rows] == [Row, RowProblem, Row]
    problem = rows[1]
    assert isinstance(problem, RowProblem)
    assert (problem.number, problem.line, problem.field) == (2, 3, "row")
    assert reason in problem.reason


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS)[:-1],
        json.dumps(ROWS)[:-20],
        json.dumps(ROWS)[:-1] + ",]",
        json.dumps(ROWS).replace("}, {", "} {"),
        "[",
        "[[",
    ],
)
def test_a_torn_array_is_refused(tmp_path: Path, text: str):
    path = written(tmp_path / "a.json", text)
    with pytest.raises(DataError, match=r"not a JSON array after row \d"):
        list(read_file(path))


def test_an_empty_array_has_no_rows(tmp_path: Path):
    assert values(written(tmp_path / "a.json", " [ ] ")) == []


def test_a_json_file_of_another_shape_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="neither an array of rows nor one JSON object a line"):
        list(read_file(written(tmp_path / "a.json", json.dumps({"data": ROWS}, indent=1))))


def test_a_torn_parquet_file_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        list(read_file(path))


@pytest.mark.parametrize(("name", "says"), [("absent.jsonl", "no such file"), ("a.csv", ".parquet"), (".", "a folder")])
def test_what_is_no_data_file_is_refused(tmp_path: Path, name: str, says: str):
    written(tmp_path / "a.csv", "a,b")
    with pytest.raises(DataError, match=says):
        load_rows(DataConfig(dataset=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["sarter", "./absent", "a/b/c"])
def test_a_name_that_is_nothing_says_what_it_may_be(name: str):
    with pytest.raises(DataError, match="no local file, no hub id"):
        load_rows(DataConfig(dataset=name))


def test_a_hub_that_does_not_answer_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = load_rows(DataConfig(dataset="graft-tests/no-such-set", split="train"))
    with pytest.raises(DataError, match="the hub did not give it"):
        next(source.rows)


def test_limit_takes_the_first_rows(tmp_path: Path):
    path = written(tmp_path / "a.jsonl", LINES)
    source = load_rows(DataConfig(dataset=str(path), limit=2, format="openai"))
    assert [row.number for row in source.rows] == [1, 2]
    assert (source.name, source.layout) == (str(path), OPENAI)


@pytest.mark.parametrize("name", ["starter", "a.jsonl"])
def test_a_file_has_no_splits(tmp_path: Path, name: str):
    path = written(tmp_path / "a.jsonl", LINES)
    with pytest.raises(DataError, match=r"data\.split = 'test'"):
        load_rows(DataConfig(dataset="starter" if name == "starter" else str(path), split="test"))


def test_the_starter_set_is_shipped():
    source = load_rows(DataConfig(dataset="starter"))
    assert source.layout is ALPACA
    assert len(list(source.rows)) == len(STARTER.read_bytes().splitlines())


def test_dataset_info_leads_to_the_file_beside_it(tmp_path: Path):
    written(tmp_path / "rows.json", json.dumps(ROWS))
    entry = {"mine": {"file_name": "rows.json", "columns": {"prompt": "instruction", "response": "output"}}}
    info = written(tmp_path / "dataset_info.json", json.dumps(entry))
    source = load_rows(DataConfig(dataset="mine", dataset_info=info))
    assert [row.value for row in source.rows if isinstance(row, Row)] == ROWS
    with pytest.raises(DataError, match=r"data\.format = 'alpaca'"):
        load_rows(DataConfig(dataset="mine", dataset_info=info, format="alpaca"))
