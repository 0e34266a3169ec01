from __future__ import annotations

import pytest

from evalharness.metrics.language import Script, length_words, rouge_tokens, script_of


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("The cat sat.", Script.LATIN),
        ("Use print(7), naïve für alle.", Script.LATIN),
        ("今天天气很好。", Script.CJK),
        ("用 Python 写一个函数来计算阶乘。", Script.CJK),
        ("Use the word 好 in a sentence.", Script.LATIN),
        ("Привет, мир", Script.OTHER),
        ("=> 🙂", Script.OTHER),
    ],
)
def test_the_script_is_that_of_most_letters(text, script):
    assert script_of(text) is script


@pytest.mark.parametrize("text", ["Hello there, you.", "今天天气 very good。", "Привет, мир", "=> 🙂"])
def test_every_reference_has_tokens(text):
    assert rouge_tokens(text, script_of(text))


def test_chinese_is_counted_by_characters_and_latin_words_in_it_by_words():
    assert rouge_tokens("用Python写, 好!", Script.CJK) == ["用", "python", "写", "好"]
    assert length_words("用 Python 写 two words") == 5
    assert length_words("") == 0
