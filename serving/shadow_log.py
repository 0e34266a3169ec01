"""The shadow log: what two revisions answered to the same request, in numbers only; never message text."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel, ConfigDict, ValidationError

logger = logging.getLogger("graft.shadow")
MAX_LOG_BYTES = 4 * 2**20  # of a name's current file; the one before it is kept too, about 20,000 records in all


class ShadowSide(BaseModel):
    """One revision's answer. Times are counted from its row in the batch; `ttft_s` is null for no token."""

    model_config = ConfigDict(frozen=True)

    revision: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    ttft_s: float | None
    seconds: float


class ShadowRecord(BaseModel):
    """One choice of one request, answered twice. Only greedy answers (temperature 0) can be expected to be equal."""

    model_config = ConfigDict(frozen=True)

    time: str
    request_id: str
    choice: int
    temperature: float
    answered: ShadowSide
    shadow: ShadowSide
    common_prefix_tokens: int
    equal: bool


class ShadowComparison(BaseModel):
    """All records of one pair of revisions. The means are per choice."""

    answered: str  # revision
    shadow: str  # revision
    choices: int
    equal: int
    greedy: int
    greedy_equal: int
    mean_common_prefix_tokens: float
    mean_answered_tokens: float
    mean_shadow_tokens: float
    mean_answered_s: float
    mean_shadow_s: float
    mean_answered_ttft_s: float | None
    mean_shadow_ttft_s: float | None
    finish_reasons: dict[str, int]  # "stop/length": the answer's, then the shadow's


class ShadowLog:
    """Appends records to one JSON-lines file a model name, and compares them; its methods block, for short."""

    def __init__(self, directory: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def append(self, name: str, records: Sequence[ShadowRecord]) -> None:
        """Each line begins with its own line break, so that one which a crash cut short spoils no other."""
        lines = "".join(f"\n{record.model_dump_json()}" for record in records)
        current, previous = self._paths(name)
        with self._lock:
            self._directory.mkdir(parents=True, exist_ok=True)
            if current.is_file() and current.stat().st_size + len(lines) > self._max_bytes:
                current.replace(previous)
            with current.open("ab") as file:
                file.write(lines.encode())

    def compare(self, name: str) -> list[ShadowComparison]:
        """Returns one comparison a pair of revisions, in the order of their first record."""
        pairs: dict[tuple[str, str], list[ShadowRecord]] = {}
        for record in self.records(name):
            pairs.setdefault((record.answered.revision, record.shadow.revision), []).append(record)
        return [_comparison(pair, records) for pair, records in pairs.items()]

    def records(self, name: str) -> Iterator[ShadowRecord]:
        """Yields what the files hold, oldest first; a line that a crash cut short is logged and left out."""
        with self._lock:
            texts = [path.read_text(encoding="utf-8") for path in reversed(self._paths(name)) if path.is_file()]
        for line in filter(None, "".join(texts).splitlines()):
            try:
                yield ShadowRecord.model_validate_json(line)
            except ValidationError:
                logger.warning("the shadow log of %s has a line that is no record, and it is left out", name)

    def _paths(self, name: str) -> tuple[Path, Path]:
        """No model name has a "~" or begins with a dot; only a current file ends in .jsonl, however a name ends."""
        current = f"{name.replace('/', '~')}.jsonl"
        return self._directory / current, self._directory / f"{current}.1"


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many leading tokens two answers share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def _comparison(pair: tuple[str, str], records: Sequence[ShadowRecord]) -> ShadowComparison:
    greedy = [record for record in records if record.temperature == 0]
    return ShadowComparison(
        answered=pair[0],
        shadow=pair[1],
        choices=len(records),
        equal=sum(record.equal for record in records),
        greedy=len(greedy),
        greedy_equal=sum(record.equal for record in greedy),
        mean_common_prefix_tokens=fmean(record.common_prefix_tokens for record in records),
        mean_answered_tokens=fmean(record.answered.completion_tokens for record in records),
        mean_shadow_tokens=fmean(record.shadow.completion_tokens for record in records),
        mean_answered_s=fmean(record.answered.seconds for record in records),
        mean_shadow_s=fmean(record.shadow.seconds for record in records),
        mean_answered_ttft_s=_mean_known([record.answered.ttft_s for record in records]),
        mean_shadow_ttft_s=_mean_known([record.shadow.ttft_s for record in records]),
        finish_reasons=dict(Counter(f"{r.answered.finish_reason}/{r.shadow.finish_reason}" for r in records)),
    )


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
