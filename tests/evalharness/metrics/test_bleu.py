from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from evalharness.metrics.bleu import Bleu, corpus_bleu

PREDICTIONS = ["The cat sat on a mat in the sun.", "Dogs bark at night, loudly.", "", "One two."]
REFERENCES = [
    "The cat sat on the mat in the sun.",
    "At night all dogs bark loudly.",
    "Nothing was said.",
    "One two three.",
]


def compute(tmp_path, predictions, references, tokenize="13a"):
    metric = Bleu(keep_in_memory=True, cache_dir=str(tmp_path))
    return metric.compute(predictions=predictions, references=references, tokenize=tokenize)


def corpus(result) -> float:
    return float(corpus_bleu(np.sum(result["statistics"], axis=0, keepdims=True).astype(float))[0])


def test_summed_statistics_give_sacrebleus_corpus_score(tmp_path):
    found = compute(tmp_path, PREDICTIONS, REFERENCES)
    expected = BLEU().corpus_score(PREDICTIONS, [REFERENCES])
    assert corpus(found) == pytest.approx(expected.score)
    assert found["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_identical_text_scores_100(tmp_path):
    assert corpus(compute(tmp_path, REFERENCES, REFERENCES)) == pytest.approx(100)


def test_identical_chinese_scores_100_with_its_tokenizer(tmp_path):
    texts = ["今天天气很好，我们去公园。"]
    found = compute(tmp_path, texts, texts, tokenize="zh")
    assert corpus(found) == pytest.approx(100)
    assert "tok:zh" in found["signature"]


def test_only_empty_replies_score_zero(tmp_path):
    assert corpus(compute(tmp_path, [""], ["The cat sat on the mat."])) == 0
