"""Properties of the preview: what is marked is what is trained, and no row steers the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.tiny import make_tokenizer
from training.config import TrainConfig, load_recipe
from training.preview import mark, preview


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    rows = [
        {"instruction": "Say hi.", "input": "", "output": "fox\x1b[31m\nok"},
        {"instruction": "", "input": "", "output": "x"},
        {"instruction": "Say more.", "input": "", "output": "the lazy dog. " * 200},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return load_recipe("smollm2-starter", ["--data.dataset", str(path)])


def shown(config: TrainConfig, count: int, out: io.StringIO) -> str:
    preview(config, count, out, make_tokenizer())
    return out.getvalue()


def test_without_a_terminal_trained_tokens_stand_in_brackets(config: TrainConfig):
    text = shown(config, 1, io.StringIO())
    assert "3 rows, 2 used, 1 rejected" in text
    assert "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n[[fox" in text
    assert "ok<|im_end|>]]\n" in text
    assert "Say more." not in text


def test_on_a_terminal_trained_tokens_are_green(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown(config, 1, Terminal())
    assert "assistant\n\x1b[32mfox" in text
    assert "<|im_end|>\x1b[0m\n" in text
    assert "[[" not in text


def test_no_color_is_honoured(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(config, 1, Terminal())
    assert "\x1b" not in text
    assert "[[fox" in text


def test_control_characters_of_a_row_are_shown_not_sent(config: TrainConfig):
    text = shown(config, 1, io.StringIO())
    assert "fox\\x1b[31m\nok" in text
    assert "\x1b" not in text


def test_counts_say_what_is_trained_and_what_is_lost(config: TrainConfig):
    tokenizer = make_tokenizer()
    lines = [line for line in shown(config, 5, io.StringIO()).splitlines() if line.startswith("--- ")]
    assert len(lines) == 2
    trained = len(tokenizer.encode("fox\x1b[31m\nok<|im_end|>"))
    assert f"tokens, {trained} trained, 0 lost to the cutoff of 512" in lines[0]
    assert lines[1].startswith("--- row 3 (line 3): 512 tokens, ")
    assert " 0 lost" not in lines[1]


def test_marks_leave_the_text_whole(config: TrainConfig):
    from training.chat import Message, render_example

    tokenizer = make_tokenizer()
    example = render_example(
        tokenizer,
        [Message("user", "hi 狐"), Message("assistant", "a"), Message("user", "b"), Message("assistant", "狐狸")],
    )
    marked = mark(tokenizer, example, colour=False)
    assert marked.count("[[") == 2
    assert marked.replace("[[", "").replace("]]", "") == tokenizer.decode(example.input_ids)
