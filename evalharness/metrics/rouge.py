"""ROUGE-1, ROUGE-2 and ROUGE-L F1 of each completion, 0 to 100, with the tokenizer of the reference's script."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

from evalharness.metrics.language import Script, rouge_tokens, script_of

TYPES = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
SIGNATURE = (
    f"rouge_score:{version('rouge_score')}|score:f1|average:mean|stemmer:no"
    "|tokenizer:latin=default,cjk=characters,other=unicode-words"
)


class Rouge(evaluate.Metric):  # type: ignore[misc]  # the library is untyped
    """Returns one number a sample and type; averaging and intervals are the caller's."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Lin (2004), ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description="predictions, references: lists of texts",
            features=datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        scorers = {script: RougeScorer(list(TYPES), tokenizer=_Tokenizer(script)) for script in Script}
        scores: dict[str, list[float]] = {name: [] for name in TYPES.values()}
        for prediction, reference in zip(predictions, references, strict=True):
            found = scorers[script_of(reference)].score(reference, prediction)
            for theirs, ours in TYPES.items():
                scores[ours].append(100 * found[theirs].fmeasure)
        return scores


class _Tokenizer:
    """rouge_score's tokenizer interface."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def tokenize(self, text: str) -> list[str]:
        return rouge_tokens(text, self._script)
