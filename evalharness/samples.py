"""Samples: held-out prompts with their references, and the fixed prompts that are shown side by side."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evalharness.errors import SampleError

FIXED_PROMPTS = Path(__file__).parent / "prompts" / "fixed.jsonl"


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Sample(BaseModel):
    """One prompt; fixed prompts have no reference."""

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)

    id: str = Field(min_length=1)
    messages: tuple[Message, ...] = Field(min_length=1)
    reference: str | None = None

    def prompt_text(self) -> str:
        """Returns the last user text, for people to read."""
        return self.messages[-1].content


class _AlpacaRow(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    instruction: str = Field(min_length=1)
    input: str = ""
    output: str
    system: str = ""
    history: tuple[Any, ...] = Field(default=(), max_length=0)  # earlier turns would change the prompt


class _FixedRow(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    prompt: str


@dataclass(frozen=True, slots=True)
class SampleSet:
    samples: tuple[Sample, ...]
    sha256: str  # over the normalised samples, so that a file's format and white space do not count


def load_samples(path: Path) -> SampleSet:
    """Reads held-out rows, chats or Alpaca, JSON or JSONL. Raises SampleError naming the row and the field."""
    samples = _with_unique_ids([_sample(raw, where) for raw, where in _rows(path)], path)
    if not samples:
        raise SampleError(f"{path}: no rows; give a file with at least one held-out sample")
    return SampleSet(samples, data_sha256(samples))


def load_fixed_prompts(path: Path = FIXED_PROMPTS) -> SampleSet:
    rows = (_FixedRow.model_validate(raw) for raw, _ in _rows(path))
    samples = tuple(Sample(id=row.id, messages=(Message(role="user", content=row.prompt),)) for row in rows)
    return SampleSet(samples, data_sha256(samples))


def data_sha256(samples: Iterable[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        line = json.dumps(sample.model_dump(), ensure_ascii=True, sort_keys=True, separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _rows(path: Path) -> Iterator[tuple[Any, str]]:
    """Yields each row and where it stands."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            yield from ((raw, f"{path}: row {number}") for number, raw in enumerate(json.loads(text), start=1))
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield json.loads(line), f"{path}: line {number}"
    except OSError as error:
        raise SampleError(f"{path}: cannot be read ({error.strerror}); give --held-out an existing file") from error
    except ValueError as error:  # JSON and UTF-8
        raise SampleError(f"{path}: is neither JSON nor JSON Lines in UTF-8: {error}") from error


def _sample(raw: Any, where: str) -> Sample:
    if not isinstance(raw, dict) or not ({"messages", "instruction"} & raw.keys()):
        raise SampleError(f"{where}: neither `messages` nor `instruction`; rows are chats or Alpaca")
    try:
        sample = Sample.model_validate(raw) if "messages" in raw else _from_alpaca(_AlpacaRow.model_validate(raw))
    except ValidationError as error:
        first = error.errors()[0]
        raise SampleError(f"{where}: field {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if sample.messages[-1].role != "user":
        raise SampleError(
            f"{where}: field messages: ends with {sample.messages[-1].role!r}; the last one must be 'user'"
        )
    if not (sample.reference or "").strip():
        raise SampleError(f"{where}: the reference (or output) is empty; nothing could be compared with it")
    return sample


def _from_alpaca(row: _AlpacaRow) -> Sample:
    text = f"{row.instruction}\n{row.input}" if row.input else row.instruction
    system = (Message(role="system", content=row.system),) if row.system else ()
    parts = json.dumps([row.system, row.instruction, row.input, row.output])
    stable_id = hashlib.sha256(parts.encode()).hexdigest()[:16]
    return Sample(id=stable_id, messages=(*system, Message(role="user", content=text)), reference=row.output)


def _with_unique_ids(samples: list[Sample], path: Path) -> tuple[Sample, ...]:
    twice = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if twice:
        raise SampleError(f"{path}: {len(twice)} ids stand twice, {twice[0]!r} first; remove the repeated rows")
    return tuple(samples)
