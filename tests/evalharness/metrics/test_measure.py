from __future__ import annotations

import math

import numpy as np
import pytest

from evalharness.metrics import measure
from evalharness.metrics.measure import Completion, Nll, measures

ENGLISH, CHINESE = "The cat sat on the mat in the sun.", "今天天气很好，我们去公园。"


def completions(*references: str) -> list[Completion]:
    return [Completion(f"s{number}", "base", text, text) for number, text in enumerate(references)]


def names(*references: str) -> list[str]:
    return [measure.name for measure in measures(completions(*references), [])]


def test_each_language_has_its_own_bleu_row_when_present():
    assert [name for name in names(ENGLISH) if "bleu" in name] == ["bleu"]
    assert [name for name in names(CHINESE) if "bleu" in name] == ["bleu_zh"]
    assert [name for name in names(ENGLISH, CHINESE) if "bleu" in name] == ["bleu", "bleu_zh"]


def test_rouge_averages_all_rows_and_its_signature_says_how_many_of_each():
    rouge = next(m for m in measures(completions(ENGLISH, CHINESE, CHINESE), []) if m.name == "rouge_l")
    assert len(rouge.statistics["base"]) == 3
    assert "replies:latin=1,cjk=2,other=0" in rouge.signature


def test_the_scores_do_not_depend_on_the_chunks_they_are_made_in(monkeypatch):
    texts = [f"{ENGLISH} It was number {number}." for number in range(5)]
    replies = [Completion(f"s{n}", "base", text[n:], text) for n, text in enumerate([*texts, CHINESE])]
    whole = measures(replies, [])
    monkeypatch.setattr(measure, "CHUNK_REPLIES", 2)
    chunked = measures(replies, [])
    assert [(m.name, m.signature, m.statistics) for m in chunked] == [
        (m.name, m.signature, m.statistics) for m in whole
    ]
    assert [len(m.statistics["base"]) for m in chunked if m.name == "chrf"] == [6]


def test_without_samples_every_measure_is_there_and_empty():
    found = measures([], [])
    expected = ["perplexity", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "reply_length"]
    assert [m.name for m in found] == expected
    assert all(not m.statistics for m in found)


def test_every_measure_of_identical_text_is_100_but_perplexity_and_length():
    found = measures(completions(ENGLISH, CHINESE), [Nll("s0", "base", 0.0, 4)])
    values = {
        m.name: float(m.aggregate(np.sum(list(m.statistics["base"].values()), axis=0, keepdims=True).astype(float))[0])
        for m in found
    }
    assert {round(value, 6) for name, value in values.items() if name not in {"perplexity", "reply_length"}} == {100}
    assert values["perplexity"] == 1
    assert values["reply_length"] == 10


def test_every_signature_names_its_implementation_and_version():
    found = {m.name: m.signature for m in measures(completions(ENGLISH, CHINESE), [])}
    assert found["rouge_l"].startswith("rouge_score:0.")
    assert "stemmer:no" in found["rouge_l"]
    assert all("version:" in found[name] for name in ("bleu", "bleu_zh", "chrf"))


def test_llama_factorys_measures_come_last_and_only_when_asked_for():
    found = [m.name for m in measures(completions(ENGLISH), [], lf=True)]
    assert found[:-5] == [m.name for m in measures(completions(ENGLISH), [])]
    assert found[-5:] == ["lf_bleu_4", "lf_rouge_1", "lf_rouge_2", "lf_rouge_l", "lf_perplexity_row_mean"]


def test_llama_factorys_perplexity_is_the_mean_of_rows_not_the_corpus_one():
    nlls = [Nll("s0", "base", 0.0, 4), Nll("s1", "base", 2 * math.log(9), 2), Nll("s2", "other", 9999.0, 1)]
    found = {m.name: m for m in measures([], nlls, lf=True)}
    rows = np.array(list(found["lf_perplexity_row_mean"].statistics["base"].values()))
    assert found["lf_perplexity_row_mean"].aggregate(rows.sum(axis=0, keepdims=True))[0] == pytest.approx((1 + 9) / 2)
    rows = np.array(list(found["perplexity"].statistics["base"].values()))
    assert found["perplexity"].aggregate(rows.sum(axis=0, keepdims=True))[0] == pytest.approx(9 ** (2 / 6))
    assert found["lf_perplexity_row_mean"].statistics["other"]["s2"] == [math.exp(300), 1.0]
