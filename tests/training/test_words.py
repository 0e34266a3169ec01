"""Properties of words: signs, case and width do not count, and a Chinese character is a word."""

from __future__ import annotations

import pytest

from training.words import normalise, words


@pytest.mark.parametrize("text", ["  The\tCAT\n sat ", "the cat sat", "ＴＨＥ　ｃａｔ sat"])
def test_case_width_and_white_space_do_not_count(text: str):
    assert normalise(text) == "the cat sat"


def test_a_chinese_character_is_a_word_and_a_sign_is_none():
    assert words("用 Python3 写，好！naïve-x") == ["用", "python3", "写", "好", "naïve", "x"]
    assert words("?! —") == []
