"""sacreBLEU's chrF statistics of each completion, and the corpus score of their sums."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics.chrf import CHRF

from evalharness.statistics import FloatArray

BETA = CHRF.BETA


class Chrf(evaluate.Metric):  # type: ignore[misc]  # the library is untyped
    """Returns `statistics`, for each character order 1-6 (in hypothesis, in reference, matched), and the signature."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Popović (2015), chrF: character n-gram F-score for automatic MT evaluation",
            inputs_description="predictions, references: lists of texts",
            features=datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        chrf = CHRF()
        # sacreBLEU's own significance tests resample these; its public score does not carry them.
        statistics = chrf._extract_corpus_statistics(predictions, [references])
        return {"statistics": statistics, "signature": str(chrf.get_signature())}


def corpus_chrf(sums_RK: FloatArray) -> FloatArray:
    """The aggregate of summed statistics: one chrF, 0 to 100, a resample."""
    hyp, ref, match = (sums_RK[:, offset::3] for offset in range(3))
    used = (hyp > 0) & (ref > 0)  # an order that a short text lacks does not count
    orders = np.maximum(used.sum(axis=1), 1)
    precision = np.where(used, match / np.maximum(hyp, 1), 0).sum(axis=1) / orders
    recall = np.where(used, match / np.maximum(ref, 1), 0).sum(axis=1) / orders
    weighted = BETA**2 * precision + recall
    return np.asarray(100 * (1 + BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1))
