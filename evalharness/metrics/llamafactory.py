"""LLaMA-Factory's own BLEU-4 and ROUGE of each completion, 0 to 100, to compare with the numbers its users have.

They are no field standard: BLEU-4 is over characters and per sentence, ROUGE over jieba's words with sets of n-grams.
Sources: LLaMA-Factory's train/sft/metric.py, nltk 3.9's sentence_bleu with method3, and rouge_chinese 1.0.3.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from evalharness.errors import EvalError

PREFIX = "lf_"
LABELS = {
    "lf_bleu_4": "BLEU-4 (LF)",
    "lf_rouge_1": "ROUGE-1 (LF)",
    "lf_rouge_2": "ROUGE-2 (LF)",
    "lf_rouge_l": "ROUGE-L (LF)",
}
SIGNATURES = {
    "lf_bleu_4": "llamafactory:sentence_bleu|tokens:characters|smooth:method3|average:mean",
    "lf_rouge_1": "llamafactory:rouge_chinese|words:jieba|n-grams:sets|score:f1|average:mean",
    "lf_rouge_2": "llamafactory:rouge_chinese|words:jieba|n-grams:sets|score:f1|average:mean",
    "lf_rouge_l": "llamafactory:rouge_chinese|words:jieba|lcs:whole text|score:f1|average:mean",
}
_JIEBA = "0.42.1"
_EPSILON = 1e-8  # rouge_chinese's, in the denominator of F1
_SENTENCE_ENDS = (  # rouge_chinese's; where it breaks a line decides which blank lines count as a word
    re.compile(r"([。！？?])([^”’])"),
    re.compile(r"(\.{6})([^”’])"),
    re.compile(r"(…{2})([^”’])"),
    re.compile(r"([。！？?][”’])([^，。！？?])"),
)
Cut = Callable[[str], Sequence[str]]


def load_jieba() -> Cut:
    """Returns jieba's word splitter, whose dictionary takes a second to load. Raises EvalError without jieba 0.42.1."""
    try:
        found = version("jieba")
    except PackageNotFoundError:
        found = "not installed"
    if found != _JIEBA:
        raise EvalError(f"--lf needs jieba {_JIEBA} ({found} here): pip install jieba=={_JIEBA}, or leave --lf out")
    import jieba  # type: ignore[import-untyped]

    jieba.setLogLevel(logging.WARNING)  # it tells of its dictionary on stderr
    words: Cut = jieba.Tokenizer().lcut
    return words


def scores(completion: str, reference: str, cut: Cut) -> dict[str, float]:
    """Returns one number for each of `LABELS`, rounded to four decimals as LLaMA-Factory does."""
    left, right = rouge_words(completion, cut), rouge_words(reference, cut)
    found = {"lf_bleu_4": bleu_4(completion, reference), "lf_rouge_1": 0.0, "lf_rouge_2": 0.0, "lf_rouge_l": 0.0}
    if any(left) and any(right):
        found["lf_rouge_1"], found["lf_rouge_2"] = rouge_n(left, right, 1), rouge_n(left, right, 2)
        found["lf_rouge_l"] = _f1(_longest_common(left, right), len(left), len(right))
    return {name: round(100 * value, 4) for name, value in found.items()}


def bleu_4(completion: str, reference: str) -> float:
    """Returns BLEU over character 1- to 4-grams, 0 to 1; the k-th order without a match counts 1 / 2^k matches."""
    logs, missed = [], 0
    for order in range(1, 5):
        own, other = (Counter(_grams(text, order)) for text in (completion, reference))
        matched: float = sum((own & other).values())
        if not matched:
            if order == 1:
                return 0.0
            missed += 1
            matched = 0.5**missed
        logs.append(math.log(matched / max(sum(own.values()), 1)))
    shortness = min(0.0, 1 - len(reference) / len(completion))
    return math.exp(shortness + sum(logs) / 4)


def rouge_words(text: str, cut: Cut) -> list[str]:
    """Returns jieba's words as rouge_chinese reads them; a blank line between two others is an empty word."""
    joined = " ".join(cut(text))
    for ends in _SENTENCE_ENDS:
        joined = ends.sub("\\1\n\\2", joined)
    lines = [" ".join(line.split()) for line in joined.rstrip().split("\n") if line]
    return [word for line in lines for word in line.split(" ")]


def rouge_n(left: Sequence[str], right: Sequence[str], order: int) -> float:
    own, other = set(_grams(left, order)), set(_grams(right, order))
    return _f1(len(own & other), len(own), len(other))


def _grams(tokens: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1)]


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence."""
    above = [0] * (len(right) + 1)
    for word in left:
        row = [0]
        for at, other in enumerate(right):
            row.append(above[at] + 1 if word == other else max(above[at + 1], row[at]))
        above = row
    return above[-1]


def _f1(shared: int, left: int, right: int) -> float:
    precision, recall = shared / left if left else 0.0, shared / right if right else 0.0
    return 2 * precision * recall / (precision + recall + _EPSILON)
