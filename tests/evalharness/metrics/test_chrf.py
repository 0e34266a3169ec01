from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics.chrf import CHRF

from evalharness.metrics.chrf import Chrf, corpus_chrf

PREDICTIONS = ["The cat sat on a mat.", "Dogs bark at night.", "", "ab"]
REFERENCES = ["The cat sat on the mat.", "At night all dogs bark.", "Nothing was said.", "abc"]


def statistics(tmp_path, predictions, references) -> np.ndarray:
    metric = Chrf(keep_in_memory=True, cache_dir=str(tmp_path))
    return np.array(metric.compute(predictions=predictions, references=references)["statistics"], dtype=float)


def test_summed_statistics_give_sacrebleus_corpus_score(tmp_path):
    found = statistics(tmp_path, PREDICTIONS, REFERENCES).sum(axis=0, keepdims=True)
    assert corpus_chrf(found)[0] == pytest.approx(CHRF().corpus_score(PREDICTIONS, [REFERENCES]).score)


def test_each_row_alone_gives_its_own_score(tmp_path):
    found = corpus_chrf(statistics(tmp_path, PREDICTIONS, REFERENCES))
    pairs = zip(PREDICTIONS, REFERENCES, strict=True)
    assert found == pytest.approx([CHRF().corpus_score([p], [[r]]).score for p, r in pairs])


def test_identical_text_scores_100_and_an_empty_reply_zero(tmp_path):
    assert corpus_chrf(statistics(tmp_path, ["今天天气很好。", ""], ["今天天气很好。", "abc"])) == pytest.approx(
        [100, 0]
    )
