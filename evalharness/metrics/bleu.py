"""sacreBLEU's BLEU statistics of each completion, and the corpus score of their sums."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics.bleu import BLEU

from evalharness.statistics import FloatArray


class Bleu(evaluate.Metric):  # type: ignore[misc]  # the library is untyped
    """Returns `statistics`, a row (hyp_len, ref_len, correct 1-4, total 1-4) a sample, and sacreBLEU's signature."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Post (2018), A Call for Clarity in Reporting BLEU Scores",
            inputs_description="predictions, references: lists of texts; tokenize: a sacreBLEU tokenizer, 13a or zh",
            features=datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions: list[str], references: list[str], tokenize: str = "13a") -> dict[str, Any]:
        bleu = BLEU(tokenize=tokenize, force=True)
        scores = [
            bleu.corpus_score([text], [[reference]]) for text, reference in zip(predictions, references, strict=True)
        ]
        statistics = [[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores]
        return {"statistics": statistics, "signature": str(bleu.get_signature())}


def corpus_bleu(sums_RK: FloatArray) -> FloatArray:
    """The aggregate of summed statistics: one BLEU, 0 to 100, a resample."""
    return np.array([_one(row) for row in sums_RK])


def _one(sums_K: FloatArray) -> float:
    hyp_len, ref_len, *counts = (round(value) for value in sums_K.tolist())
    return float(BLEU.compute_bleu(counts[:4], counts[4:], hyp_len, ref_len, smooth_method="exp").score)
