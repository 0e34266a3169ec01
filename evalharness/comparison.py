"""Comparison: every metric of a run for each arm, and each arm's paired difference to the base; from records only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from evalharness.arms import ArmLabel, arm_labels
from evalharness.metrics.llamafactory import PREFIX
from evalharness.metrics.measure import NLL_MEASURES, Better, Completion, Measure, Nll, measures
from evalharness.progress import Progress
from evalharness.records import Record, RecordKey, RecordKind, RunData, RunHeader, SampleStatus, read_run
from evalharness.revisions import AnswererWatch
from evalharness.samples import Sample
from evalharness.statistics import (
    NO_DIFFERENCE,
    Bootstrap,
    Difference,
    Estimate,
    FloatArray,
    estimate,
    paired_difference,
)

MISSING = "missing"  # not asked yet
FEW_PAIRS = 30  # a percentile bootstrap over fewer samples gives intervals that are too narrow


@dataclass(frozen=True, slots=True)
class MetricRow:
    name: str
    label: str
    better: Better
    signature: str
    estimates: Mapping[str, Estimate]  # by arm, each over all that arm has
    differences: Mapping[str, Difference]  # by arm but the base
    failed: Mapping[str, int]  # by arm: samples without a score, asked or not
    unavailable: str | None  # why there is no value


@dataclass(frozen=True, slots=True)
class ArmSummary:
    arm: str
    statuses: Mapping[str, Mapping[str, int]]  # kind -> status -> samples
    answered_by: tuple[str, ...]  # every model and fingerprint the server named
    mixed: bool  # its replies, or its scores, came from several of those
    truncated: int  # held-out replies that ended at max_tokens


@dataclass(frozen=True, slots=True)
class Comparison:
    header: RunHeader
    bootstrap: Bootstrap
    metrics: tuple[MetricRow, ...]
    arms: tuple[ArmSummary, ...]
    warnings: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]  # arm -> sample id -> metric -> one sample's score
    data: RunData

    @property
    def base(self) -> str:
        return self.header.arms[0]

    @property
    def others(self) -> tuple[str, ...]:
        return self.header.arms[1:]

    @property
    def own_metrics(self) -> tuple[MetricRow, ...]:
        return tuple(row for row in self.metrics if not row.name.startswith(PREFIX))

    @property
    def lf_metrics(self) -> tuple[MetricRow, ...]:
        """LLaMA-Factory's, which stand apart: no number of theirs compares with one of ours."""
        return tuple(row for row in self.metrics if row.name.startswith(PREFIX))

    @property
    def labels(self) -> Mapping[str, ArmLabel]:
        return arm_labels(self.header.arms)

    def name(self, arm: str) -> str:
        """Returns what a reader calls the arm."""
        return self.labels[arm].name


def compare(directory: Path, resamples: int, out: TextIO | None = None, *, lf: bool = False) -> Comparison:
    """Scores the records of a run, finished or not, and shows its progress on `out`.

    With `lf` scores them as LLaMA-Factory does, too. Raises RecordError, and EvalError where `lf` lacks a package.
    """
    data = read_run(directory)
    header, bootstrap = data.header, Bootstrap(resamples, data.header.sampling.seed)
    found = measures(_completions(data), _nlls(data), out, lf=lf)
    arms = tuple(_summary(data, arm) for arm in header.arms)
    incomparable = _tokenised_otherwise(data)
    rows = _rows(found, data, bootstrap, incomparable, out)
    return Comparison(
        header=header,
        bootstrap=bootstrap,
        metrics=rows,
        arms=arms,
        warnings=(
            *_warnings(arms),
            *(_tokens_warning(arm) for arm in sorted(incomparable)),
            *_few_pairs(row for row in rows if not row.name.startswith(PREFIX)),
        ),
        scores=_sample_scores(found),
        data=data,
    )


def _completions(data: RunData) -> list[Completion]:
    return [
        Completion(sample.id, record.arm, record.completion or "", sample.reference or "")
        for sample, record in _answered(data, RecordKind.HELD_OUT)
    ]


def _nlls(data: RunData) -> list[Nll]:
    return [
        Nll(sample.id, record.arm, record.nll_nats, record.nll_tokens)
        for sample, record in _answered(data, RecordKind.NLL)
        if record.nll_nats is not None and record.nll_tokens
    ]


def _answered(data: RunData, kind: RecordKind) -> Iterable[tuple[Sample, Record]]:
    """Yields in the order of the samples, so that scores do not depend on which reply came first."""
    for sample in data.held_out:
        for arm in data.header.arms:
            record = data.records.get(RecordKey(kind, sample.id, arm))
            if record is not None and record.status is SampleStatus.OK:
                yield sample, record


def _rows(
    found: list[Measure], data: RunData, bootstrap: Bootstrap, incomparable: set[str], out: TextIO | None
) -> tuple[MetricRow, ...]:
    progress, rows = Progress("intervals", len(found), out), []
    for measure in found:
        rows.append(_row(measure, data, bootstrap, incomparable))
        progress.advance()
    return tuple(rows)


def _row(measure: Measure, data: RunData, bootstrap: Bootstrap, incomparable: set[str]) -> MetricRow:
    base, *others = data.header.arms
    by_arm = measure.statistics
    estimates = {
        arm: estimate(_array(by_arm.get(arm, {}), None), measure.aggregate, bootstrap) for arm in data.header.arms
    }
    differences = {
        arm: NO_DIFFERENCE
        if measure.name in NLL_MEASURES and arm in incomparable
        else _difference(measure, base, arm, bootstrap)
        for arm in others
    }
    expected = sum(measure.about(sample.reference or "") for sample in data.held_out)
    return MetricRow(
        name=measure.name,
        label=measure.label,
        better=measure.better,
        signature=f"{measure.signature}|ci:95%-percentile-bootstrap,{bootstrap.resamples},seed={bootstrap.seed}",
        estimates=estimates,
        differences=differences,
        failed={arm: expected - found.count for arm, found in estimates.items()},
        unavailable=None if any(found.count for found in estimates.values()) else _reason(measure, data),
    )


def _difference(measure: Measure, base: str, arm: str, bootstrap: Bootstrap) -> Difference:
    base_rows, arm_rows = measure.statistics.get(base, {}), measure.statistics.get(arm, {})
    both = [sample_id for sample_id in base_rows if sample_id in arm_rows]
    return paired_difference(_array(base_rows, both), _array(arm_rows, both), measure.aggregate, bootstrap)


def _array(rows: Mapping[str, Iterable[float]], ids: list[str] | None) -> FloatArray:
    return np.array([rows[sample_id] for sample_id in (rows if ids is None else ids)], dtype=np.float64)


def _reason(measure: Measure, data: RunData) -> str:
    kind = RecordKind.NLL if measure.name in NLL_MEASURES else RecordKind.HELD_OUT
    errors = Counter(
        record.error or record.status.value
        for record in data.records.values()
        if record.kind is kind and record.status is not SampleStatus.OK
    )
    return errors.most_common(1)[0][0] if errors else "no request of this kind was made yet"


def _summary(data: RunData, arm: str) -> ArmSummary:
    samples = {RecordKind.FIXED: data.prompts, RecordKind.HELD_OUT: data.held_out, RecordKind.NLL: data.held_out}
    statuses: dict[str, dict[str, int]] = {}
    for kind, wanted in samples.items():
        found = [data.records.get(RecordKey(kind, sample.id, arm)) for sample in wanted]
        statuses[kind.value] = dict(Counter(record.status.value if record else MISSING for record in found))
    own = [record for record in data.records.values() if record.arm == arm and record.status is SampleStatus.OK]
    truncated = sum(record.kind is RecordKind.HELD_OUT and record.finish_reason == "length" for record in own)
    watch = AnswererWatch()
    mixed = any(watch.see(record) is not None for record in own)
    return ArmSummary(arm, statuses, tuple(sorted({record.answerer for record in own})), mixed, truncated)


def _warnings(arms: Iterable[ArmSummary]) -> Iterable[str]:
    for summary in arms:
        if summary.mixed:
            names = ", ".join(summary.answered_by)
            yield f"{summary.arm}: answered by several revisions, so its numbers mix them: {names}"
        for kind, counts in summary.statuses.items():
            lost = {status: count for status, count in counts.items() if status != SampleStatus.OK.value}
            if lost:
                listed = ", ".join(f"{count} {status}" for status, count in sorted(lost.items()))
                yield f"{summary.arm}: {kind} has {listed}; repeat the run command to ask for those again"


def _tokenised_otherwise(data: RunData) -> set[str]:
    """Returns the arms whose server scored other token ids than the base's for some sample."""
    nlls = [record for _, record in _answered(data, RecordKind.NLL)]
    of_base = {record.sample_id: record.scored_sha256 for record in nlls if record.arm == data.header.arms[0]}
    return {r.arm for r in nlls if r.sample_id in of_base and r.scored_sha256 != of_base[r.sample_id]}


def _tokens_warning(arm: str) -> str:
    return f"{arm}: splits references into other tokens than the base, so their perplexities cannot be compared"


def _few_pairs(rows: Iterable[MetricRow]) -> Iterable[str]:
    few: dict[str, list[str]] = {}
    for row in rows:
        for arm, found in row.differences.items():
            if 0 < found.pairs < FEW_PAIRS:
                few.setdefault(arm, []).append(f"{row.label} ({found.pairs})")
    for arm, labels in few.items():
        yield f"{arm}: under {FEW_PAIRS} pairs the intervals are too narrow; so few have {', '.join(labels)}"


def _sample_scores(found: Iterable[Measure]) -> dict[str, dict[str, dict[str, float]]]:
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for measure in found:
        for arm, rows in measure.statistics.items():
            for sample_id, statistics in rows.items():
                value = float(measure.aggregate(np.array([statistics], dtype=np.float64))[0])
                if math.isfinite(value):
                    scores.setdefault(arm, {}).setdefault(sample_id, {})[measure.name] = value
    return scores
