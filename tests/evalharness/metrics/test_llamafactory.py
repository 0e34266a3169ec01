"""LLaMA-Factory's scores, by hand: what they are, and where they differ from the field's."""

from __future__ import annotations

import math

import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from evalharness.errors import EvalError
from evalharness.metrics import llamafactory
from evalharness.metrics.llamafactory import bleu_4, load_jieba, rouge_n, rouge_words, scores


def split_at_spaces(text: str) -> list[str]:
    """What jieba makes of plain English: white space is words of its own."""
    return [part for word in text.split(" ") for part in (word, " ")][:-1]


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("abcd", "abcd", 1.0),
        ("abcd", "abce", (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25),  # no 4-gram matches: it counts a half
        ("ab", "abcd", math.exp(1 - 4 / 2) * (1 * 1 * 1 / 2 * 1 / 4) ** 0.25),  # orders 3 and 4: a half, a quarter
        ("aaaa", "ab", (1 / 4 * (1 / 2) / 3 * (1 / 4) / 2 * (1 / 8) / 1) ** 0.25),  # counts are clipped
        ("好的天", "好的", (2 / 3 * 1 / 2 * (1 / 2) / 1 * (1 / 4) / 1) ** 0.25),
        ("xyz", "abc", 0.0),
        ("", "abc", 0.0),
        ("abc", "", 0.0),
    ],
)
def test_bleu_4_is_over_characters_with_a_halved_count_for_each_order_missed(completion, reference, expected):
    assert bleu_4(completion, reference) == pytest.approx(expected)
    theirs = sentence_bleu([list(reference)], list(completion), smoothing_function=SmoothingFunction().method3)
    assert bleu_4(completion, reference) == pytest.approx(theirs)


def test_rouge_counts_each_n_gram_once_but_the_longest_common_subsequence_every_word():
    found = scores("the cat the cat", "the cat", split_at_spaces)
    assert (found["lf_rouge_1"], found["lf_rouge_2"], found["lf_rouge_l"]) == (100.0, 66.6667, 66.6667)


def test_a_longer_reply_by_hand():
    found = scores("a b x c", "a b c d", split_at_spaces)
    assert found["lf_rouge_1"] == 75.0  # a, b, c of four words each
    assert found["lf_rouge_2"] == 33.3333  # "a b" of three each
    assert found["lf_rouge_l"] == 75.0  # a b c
    assert rouge_n(["a"], ["a"], 2) == 0.0


@pytest.mark.parametrize(("completion", "reference"), [("", "a"), ("a", ""), (" \n", "a b")])
def test_an_empty_side_scores_nothing(completion: str, reference: str):
    found = scores(completion, reference, split_at_spaces)
    assert [found[name] for name in ("lf_rouge_1", "lf_rouge_2", "lf_rouge_l")] == [0.0, 0.0, 0.0]


def test_chinese_is_split_into_jiebas_words_and_a_blank_line_is_an_empty_word():
    cut = load_jieba()
    assert rouge_words("我们去公园。今天很好", cut) == ["我们", "去", "公园", "。", "今天", "很", "好"]
    assert rouge_words("one\n\ntwo", cut) == ["one", "", "two"]
    found = scores("我们去公园。", "我们去北京。", cut)
    assert found["lf_rouge_1"] == 75.0  # 我们, 去 and 。 of four words each
    assert found["lf_rouge_2"] == 33.3333


def test_another_jieba_is_refused_since_its_words_would_be_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llamafactory, "version", lambda _: "0.41")
    with pytest.raises(EvalError, match=r"--lf needs jieba 0\.42\.1 \(0\.41 here\): pip install"):
        load_jieba()
