"""Measures: every metric of a run as per-sample statistics, an aggregate and a signature."""

from __future__ import annotations

import enum
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from evalharness.metrics import llamafactory
from evalharness.metrics.bleu import Bleu, corpus_bleu
from evalharness.metrics.chrf import Chrf, corpus_chrf
from evalharness.metrics.language import Script, length_words, script_of
from evalharness.metrics.rouge import SIGNATURE as ROUGE_SIGNATURE
from evalharness.metrics.rouge import Rouge
from evalharness.progress import Progress
from evalharness.statistics import Aggregate, mean, perplexity

ROUGE_LABELS = {"rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}
CHINESE = frozenset({Script.CJK})
ALL = frozenset(Script)
SCORERS = 3  # ROUGE, BLEU and chrF each see every reply once; LLaMA-Factory's scores are a fourth
LF_PERPLEXITY = "lf_perplexity_row_mean"
NLL_MEASURES = frozenset({"perplexity", LF_PERPLEXITY})
MOST_NATS = 300.0  # a token, of LLaMA-Factory's row means: exp of an impossible token's 9999 is no number
CHUNK_REPLIES = 50  # scored between two looks at the clock


class Better(enum.Enum):
    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


@dataclass(frozen=True, slots=True)
class Completion:
    """One arm's completion, beside what it is scored against."""

    sample_id: str
    arm: str
    completion: str
    reference: str


@dataclass(frozen=True, slots=True)
class Nll:
    sample_id: str
    arm: str
    nats: float
    tokens: int


Statistics = Mapping[str, Mapping[str, Sequence[float]]]  # arm -> sample id -> K statistics


@dataclass(frozen=True, slots=True)
class Measure:
    name: str
    label: str
    better: Better
    signature: str
    aggregate: Aggregate
    statistics: Statistics
    scripts: frozenset[Script] = ALL

    def about(self, reference: str) -> bool:
        """Says whether a sample with this reference belongs to the measure."""
        return script_of(reference) in self.scripts


def measures(
    replies: Sequence[Completion], nlls: Sequence[Nll], out: TextIO | None = None, *, lf: bool = False
) -> list[Measure]:
    """Returns every measure, in the report's order; one without samples has empty statistics.

    With `lf` LLaMA-Factory's come last; raises EvalError where what they need is not installed.
    """
    cut = llamafactory.load_jieba() if lf else None
    progress = Progress("metrics", (SCORERS + lf) * len(replies), out)
    scored = [*_rouge(replies, progress), *_bleu(replies, progress), _chrf(replies, progress)]
    own = [_perplexity(nlls), *scored, _length(replies)]
    return [*own, *_llamafactory(replies, cut, progress), _lf_perplexity(nlls)] if cut else own


def _perplexity(nlls: Sequence[Nll]) -> Measure:
    signature = "exp(sum nll / sum tokens)|tokens:reference reply and its end of turn|template:the server's"
    rows = ((nll, [nll.nats, float(nll.tokens)]) for nll in nlls)
    return Measure("perplexity", "Perplexity", Better.LOWER, signature, perplexity, _by_arm(rows))


def _rouge(replies: Sequence[Completion], progress: Progress) -> list[Measure]:
    scores = _compute(Rouge, replies, progress)
    scripts = [script_of(reply.reference) for reply in replies]
    counts = ",".join(f"{script.value}={scripts.count(script)}" for script in Script)
    return [
        Measure(
            name,
            label,
            Better.HIGHER,
            f"{ROUGE_SIGNATURE}|replies:{counts}",
            mean,
            _by_arm((reply, [score, 1.0]) for reply, score in zip(replies, scores.get(name, []), strict=True)),
        )
        for name, label in ROUGE_LABELS.items()
    ]


def _bleu(replies: Sequence[Completion], progress: Progress) -> list[Measure]:
    """BLEU is a score of a corpus in one language: Chinese replies get their own row, where there are any."""
    found = {script_of(reply.reference) for reply in replies}
    rows = []
    if found - CHINESE or not found:
        result = _score(Bleu, replies, ALL - CHINESE, progress, tokenize="13a")
        rows.append(_sacrebleu("bleu", "BLEU", corpus_bleu, result))
    if found & CHINESE:
        result = _score(Bleu, replies, CHINESE, progress, tokenize="zh")
        rows.append(_sacrebleu("bleu_zh", "BLEU (Chinese)", corpus_bleu, result))
    return rows


def _chrf(replies: Sequence[Completion], progress: Progress) -> Measure:
    return _sacrebleu("chrf", "chrF", corpus_chrf, _score(Chrf, replies, ALL, progress))


def _length(replies: Sequence[Completion]) -> Measure:
    signature = "words of the completion, a CJK character counts as one|average:mean"
    rows = ((reply, [float(length_words(reply.completion)), 1.0]) for reply in replies)
    return Measure("reply_length", "Reply length (words)", Better.NEITHER, signature, mean, _by_arm(rows))


def _llamafactory(replies: Sequence[Completion], cut: llamafactory.Cut, progress: Progress) -> list[Measure]:
    scores = []
    for reply in replies:
        scores.append(llamafactory.scores(reply.completion, reply.reference, cut))
        progress.advance()
    return [
        Measure(
            name,
            label,
            Better.HIGHER,
            llamafactory.SIGNATURES[name],
            mean,
            _by_arm((reply, [found[name], 1.0]) for reply, found in zip(replies, scores, strict=True)),
        )
        for name, label in llamafactory.LABELS.items()
    ]


def _lf_perplexity(nlls: Sequence[Nll]) -> Measure:
    """The mean over rows of exp(a row's mean NLL): a few hard rows decide it, however short they are."""
    signature = f"llamafactory:mean of exp(nll / tokens) a row|at most exp({MOST_NATS:g}) a row"
    rows = ((nll, [math.exp(min(nll.nats / nll.tokens, MOST_NATS)), 1.0]) for nll in nlls)
    return Measure(LF_PERPLEXITY, "Perplexity, mean of rows (LF)", Better.LOWER, signature, mean, _by_arm(rows))


@dataclass(frozen=True, slots=True)
class _Scored:
    statistics: Statistics
    signature: str | None  # None where there was nothing to score
    scripts: frozenset[Script]


def _score(
    metric: Callable[..., Any],
    replies: Sequence[Completion],
    scripts: frozenset[Script],
    progress: Progress,
    **options: str,
) -> _Scored:
    own = [reply for reply in replies if script_of(reply.reference) in scripts]
    result = _compute(metric, own, progress, **options)
    rows = zip(own, result.get("statistics", []), strict=True)
    return _Scored(_by_arm(rows), result.get("signature"), scripts)


def _sacrebleu(name: str, label: str, aggregate: Aggregate, scored: _Scored) -> Measure:
    signature = "|".join(filter(None, (f"sacrebleu:{name}", scored.signature)))
    return Measure(name, label, Better.HIGHER, signature, aggregate, scored.statistics, scored.scripts)


def _compute(
    metric: Callable[..., Any], replies: Sequence[Completion], progress: Progress, **options: str
) -> dict[str, Any]:
    """Runs one of the metric scripts; it keeps its data in memory, and its cache folder goes away with it."""
    if not replies:
        return {}
    whole: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="graft-metric-") as cache:
        scorer = metric(keep_in_memory=True, cache_dir=cache)
        for start in range(0, len(replies), CHUNK_REPLIES):
            chunk = replies[start : start + CHUNK_REPLIES]
            texts = {"predictions": [r.completion for r in chunk], "references": [r.reference for r in chunk]}
            for name, found in scorer.compute(**texts, **options).items():
                whole[name] = [*whole.get(name, []), *found] if isinstance(found, list) else found
            progress.advance(len(chunk))
    return whole


def _by_arm(rows: Iterable[tuple[Completion | Nll, Sequence[float]]]) -> Statistics:
    statistics: dict[str, dict[str, Sequence[float]]] = {}
    for row, values in rows:
        statistics.setdefault(row.arm, {})[row.sample_id] = values
    return statistics
