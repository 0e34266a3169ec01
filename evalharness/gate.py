"""Gate rules: a metric of a comparison, an operator and a number; all must hold, and nothing may be missing."""

from __future__ import annotations

import difflib
import math
import operator
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evalharness.comparison import Comparison, MetricRow
from evalharness.errors import RuleError
from evalharness.statistics import Interval

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_RULE = re.compile(
    r"\s*(?P<name>\S+?)\s*(?P<sign><=|>=|==|!=|<|>)\s*(?P<number>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*"
)


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    sign: str
    number: float

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.number:g}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`value` is None where the metric is unavailable, which fails the rule."""

    rule: Rule
    value: float | None
    passed: bool
    implied: bool = False  # not asked for: a run with gaps must not pass


class _RuleFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: tuple[str, ...] = Field(min_length=1)


def parse_rule(text: str) -> Rule:
    match = _RULE.fullmatch(text)
    if match is None:
        raise RuleError(
            f"rule {text!r}: must look like 'rouge_l.difference.low > 0', with one of {' '.join(OPERATORS)}"
        )
    return Rule(match["name"], match["sign"], float(match["number"]))


def read_rules(path: Path) -> list[Rule]:
    """Reads `rules = ["...", ...]` from a TOML file."""
    try:
        rules = _RuleFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RuleError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise RuleError(
            f'{path}: must be TOML with rules = ["perplexity.change_percent <= -15", ...]: {error}'
        ) from error
    return [parse_rule(text) for text in rules.rules]


def judge(comparison: Comparison, rules: Sequence[Rule], allow_failed: float = 0.0) -> list[Verdict]:
    """Judges the rules, and those they imply: of each metric they name every arm has all samples, of one revision.

    `allow_failed` is the share of samples that an arm may lack. Raises RuleError where a rule names no metric.
    """
    known = dict(values(comparison))
    names = {rule: _full_name(comparison, rule, known) for rule in rules}
    asked = [_judge(rule, known[names[rule]]) for rule in rules]
    return [*asked, *_implied(comparison, frozenset(names.values()), allow_failed)]


def values(comparison: Comparison) -> Iterator[tuple[str, float | None]]:
    """Yields every number a rule can name, as `arm:metric.field`; with one adapter its differences need no arm."""
    for row in comparison.metrics:
        yield from _row_values(comparison, row)
    for summary in comparison.arms:
        yield f"{summary.arm}:mixed_revisions", float(summary.mixed)


def _row_values(comparison: Comparison, row: MetricRow) -> Iterator[tuple[str, float | None]]:
    for arm, found in row.estimates.items():
        yield f"{arm}:{row.name}.value", found.value
        yield from _bounds(f"{arm}:{row.name}", found.interval)
        yield f"{arm}:{row.name}.count", found.count
        yield f"{arm}:{row.name}.failed", row.failed[arm]
    for arm in comparison.others:
        yield from _differences(row, arm, f"{arm}:{row.name}")
    if len(comparison.others) == 1:
        yield from _differences(row, comparison.others[0], row.name)


def _full_name(comparison: Comparison, rule: Rule, known: Mapping[str, object]) -> str:
    """A rule may leave out an arm's digest, which is another after each training."""
    names = [rule.name]
    for arm, label in comparison.labels.items():
        if rule.name.startswith(f"{label.name}:"):
            names.append(arm + rule.name.removeprefix(label.name))
    for name in names:
        if name in known:
            return name
    raise RuleError(f"rule {str(rule)!r}: no metric {rule.name!r}; {_suggestion(names[-1], known)}")


def _implied(comparison: Comparison, named: frozenset[str], allow_failed: float) -> Iterator[Verdict]:
    """A rule of the user's own on the same number stands in its place."""
    for row in comparison.metrics:
        if named.isdisjoint(name for name, _ in _row_values(comparison, row)):
            continue
        for arm, failed in row.failed.items():
            if f"{arm}:{row.name}.failed" not in named:
                most = math.floor(allow_failed * (row.estimates[arm].count + failed))
                sign = "<=" if allow_failed else "=="
                yield _judge(Rule(f"{comparison.name(arm)}:{row.name}.failed", sign, most), failed, implied=True)
    for summary in comparison.arms:
        if f"{summary.arm}:mixed_revisions" not in named:
            rule = Rule(f"{comparison.name(summary.arm)}:mixed_revisions", "==", 0)
            yield _judge(rule, float(summary.mixed), implied=True)


def _differences(row: MetricRow, arm: str, prefix: str) -> Iterator[tuple[str, float | None]]:
    found = row.differences[arm]
    yield f"{prefix}.difference", found.value
    yield from _bounds(f"{prefix}.difference", found.interval)
    yield f"{prefix}.change_percent", found.change_percent
    yield from _bounds(f"{prefix}.change_percent", found.change_interval)
    yield f"{prefix}.pairs", found.pairs


def _bounds(prefix: str, interval: Interval | None) -> Iterator[tuple[str, float | None]]:
    yield f"{prefix}.low", interval.low if interval else None
    yield f"{prefix}.high", interval.high if interval else None


def _judge(rule: Rule, value: float | None, *, implied: bool = False) -> Verdict:
    return Verdict(rule, value, value is not None and OPERATORS[rule.sign](value, rule.number), implied)


def _suggestion(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"
