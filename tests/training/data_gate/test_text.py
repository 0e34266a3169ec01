"""Properties of texts: the script of most letters, a word or none, an end or a break."""

from __future__ import annotations

import pytest

from training.data_gate.text import ends_mid_sentence, has_words, script_of


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello, naïve world", "Latin"), ("今天天气很好。", "Han"), ("用 Python 写一个函数来计算。", "Han"),
        ("これはペンです", "Kana"), ("안녕하세요", "Hangul"), ("Привет, world: как", "Cyrillic"), ("Γειά σου", "Greek"),
        ("مرحبا", "Arabic"), ("שלום", "Hebrew"), ("नमस्ते", "Devanagari"), ("สวัสดี", "Thai"), ("ꦲꦏꦱꦫ", "Other"),
        ("1 + 1 = 2", "none"), ("🙂", "none"), ("", "none"), ("ｆｕｌｌ", "Latin"),
    ],
)  # fmt: skip
def test_the_script_is_that_of_most_letters(text: str, script: str):
    assert script_of(text) == script


@pytest.mark.parametrize(
    ("text", "has"), [("a", True), ("7", True), ("好", True), ("🙂", True), ("...", False), ("", False)]
)
def test_a_reply_of_signs_has_no_words(text: str, has: bool):
    assert has_words(text) is has


LONG = "and then we go on to the next of the many"


@pytest.mark.parametrize(
    ("text", "breaks"),
    [
        (f"First.\n\nIt is so {LONG}", True),
        (f"It is so {LONG},", True),
        ("因为面筋在这段时间里会放松，面团就更容易擀开，所以我们", True),
        ("```python\nprint(1)", True),
        (f"It is so {LONG}.", False),
        ("因为面筋在这段时间里会放松，面团就更容易擀开。", False),
        (f'He said: "It is so {LONG}!"', False),
        ("Paris", False),
        ("Title of a small poem", False),
        (f"Do this:\n- take it {LONG}\n- put it {LONG}", False),
        (f"1. take it {LONG}", False),
        (f"| a | {LONG} |", False),
        (f"```\n{LONG}\n```", False),
        (f"See https://example.org/{LONG}", False),
        ("", False),
    ],
)
def test_only_long_prose_or_an_open_code_block_breaks_off(text: str, breaks: bool):
    assert ends_mid_sentence(text) is breaks
