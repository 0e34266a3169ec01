from __future__ import annotations

import json

import pytest

from evalharness.errors import SampleError
from evalharness.samples import load_fixed_prompts, load_samples

CHAT = {"id": "a", "messages": [{"role": "user", "content": "Hi"}], "reference": "Hello."}
ALPACA = {"instruction": "Shorten this.", "input": "A very long text.", "output": "A text."}


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_fixed_set_has_five_prompts_with_those_of_the_first_experiment():
    texts = [sample.prompt_text() for sample in load_fixed_prompts().samples]
    assert len(set(texts)) == 5
    assert "Explain quantum computing in simple terms." in texts
    assert "Write a Python function that computes the factorial of a number." in texts
    assert "Give me three ideas for a weekend in the mountains." in texts


def test_alpaca_text_is_instruction_newline_input(tmp_path):
    with_input, without = load_samples(write(tmp_path / "a.json", [ALPACA, ALPACA | {"input": ""}])).samples
    assert with_input.prompt_text() == "Shorten this.\nA very long text."
    assert without.prompt_text() == "Shorten this."
    assert with_input.reference == "A text."


def test_the_hash_is_of_the_samples_not_of_the_file(tmp_path):
    first = load_samples(write(tmp_path / "a.json", [ALPACA]))
    assert load_samples(write(tmp_path / "b.jsonl", [dict(reversed(ALPACA.items()))])) == first
    assert load_samples(write(tmp_path / "c.json", [ALPACA | {"output": "Text."}])).sha256 != first.sha256


def test_a_chat_row_is_read_as_it_stands(tmp_path):
    (sample,) = load_samples(write(tmp_path / "a.jsonl", [CHAT | {"id": 7}])).samples
    assert (sample.id, sample.reference, sample.messages[0].role) == ("7", "Hello.", "user")


def test_unicode_line_separators_inside_a_text_do_not_split_a_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHAT | {"reference": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_samples(path).samples[0].reference == "one\u2028two"


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"text": "x"}, "neither"),
        (CHAT | {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        (CHAT | {"messages": [{"role": "assistant", "content": "x"}]}, "must be 'user'"),
        (CHAT | {"reference": "  "}, "reference"),
        (ALPACA | {"history": [["a", "b"]]}, "history"),
        (ALPACA | {"output": None}, "output"),
        (CHAT | {"id": "seen"}, "'seen'"),
    ],
)
def test_a_bad_row_is_named_with_its_field(tmp_path, row, names):
    path = write(tmp_path / "bad.jsonl", [CHAT | {"id": "seen"}, row])
    with pytest.raises(SampleError, match=names) as caught:
        load_samples(path)
    assert "line 2" in str(caught.value) or "twice" in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{not json", "\n\n"])
def test_a_file_without_rows_is_an_error(tmp_path, content):
    path = tmp_path / "empty.json"
    path.write_text(content)
    with pytest.raises(SampleError, match=r"empty\.json"):
        load_samples(path)


def test_an_absent_file_is_an_error(tmp_path):
    with pytest.raises(SampleError, match="--held-out"):
        load_samples(tmp_path / "none.jsonl")
