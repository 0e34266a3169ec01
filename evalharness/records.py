"""Records: what was asked and answered, one JSON line each, in a directory that a killed run continues."""

from __future__ import annotations

import enum
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from evalharness.errors import RecordError
from evalharness.samples import Sample

HEADER_NAME = "run.json"
SAMPLES_NAME = "samples.jsonl"
RECORDS_NAME = "records.jsonl"


class SampleStatus(enum.Enum):
    OK = "ok"
    TIMEOUT = "timeout"
    REFUSED = "refused"  # a 4xx: this request, as it is, will not be answered
    HTTP_ERROR = "http_error"  # a 5xx, or still 429 after the retries
    UNREACHABLE = "unreachable"  # no connection, or it broke
    INVALID_REPLY = "invalid_reply"  # an answer that lacks what is needed of it
    UNAVAILABLE = "unavailable"  # the server has no way to answer this kind of request


class RecordKind(enum.Enum):
    FIXED = "fixed"
    HELD_OUT = "held_out"
    NLL = "nll"  # the reference reply's log-probability


class RecordKey(NamedTuple):
    kind: RecordKind
    sample_id: str
    arm: str


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Usage(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Record(_Frozen):
    kind: RecordKind
    sample_id: str
    arm: str
    status: SampleStatus
    completion: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    nll_nats: float | None = None  # sum over the reference reply and its end-of-turn token
    nll_tokens: int | None = None
    scored_sha256: str | None = None  # of the scored token ids: equal ones are comparable between arms
    latency_s: float | None = None
    tries: int = 1
    model: str | None = None  # what the server says answered
    system_fingerprint: str | None = None
    request_id: str | None = None
    http_status: int | None = None
    error: str | None = None

    @property
    def key(self) -> RecordKey:
        return RecordKey(self.kind, self.sample_id, self.arm)

    @property
    def answerer(self) -> str:
        return f"{self.model or 'unnamed'} ({self.system_fingerprint or 'no fingerprint'})"


class SamplingSettings(_Frozen):
    """Every field is sent with every request, so that no server default decides."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = 1
    seed: int = 0


class RunHeader(_Frozen):
    """What a run directory was made from; a resumed run must match all of it but the address."""

    format_version: Literal[1] = 1
    url: str  # where the run began; the same revisions may answer elsewhere later
    arms: tuple[str, ...]  # the first is the one the others are compared with
    sampling: SamplingSettings
    data_sha256: str
    prompts_sha256: str
    limit: int | None
    held_out_samples: int
    served: dict[str, str | None] = {}  # each arm's revision as the server told it; none of directories before that


class RunData(NamedTuple):
    header: RunHeader
    prompts: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    records: dict[RecordKey, Record]


def open_run(directory: Path, header: RunHeader, prompts: tuple[Sample, ...], held_out: tuple[Sample, ...]) -> None:
    """Makes the directory, or checks that it was made from the same inputs. Raises RecordError where it was not."""
    path = directory / HEADER_NAME
    if path.exists():
        found = _read_header(path)
        _refuse_other_inputs(directory, found, header)
        _refuse_other_revisions(directory, found, header)
        return
    if (directory / RECORDS_NAME).exists():
        raise RecordError(f"{directory}: has {RECORDS_NAME} but no {HEADER_NAME}; give --out another directory")
    lines = "".join(sample.model_dump_json() + "\n" for sample in (*prompts, *held_out))
    temporary = path.with_suffix(".tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / SAMPLES_NAME).write_text(lines, encoding="utf-8")
        temporary.write_text(header.model_dump_json(indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RecordError(f"--out {directory}: cannot be written ({error.strerror}); give another --out") from error


def read_run(directory: Path) -> RunData:
    """Reads a run, finished or not; of several records for one key the last counts. Raises RecordError."""
    header = _read_header(directory / HEADER_NAME)
    lines = (directory / SAMPLES_NAME).read_text(encoding="utf-8").split("\n")
    samples = tuple(Sample.model_validate_json(line) for line in lines if line)
    prompts = tuple(sample for sample in samples if sample.reference is None)
    held_out = tuple(sample for sample in samples if sample.reference is not None)
    return RunData(header, prompts, held_out, read_records(directory / RECORDS_NAME))


def read_records(path: Path) -> dict[RecordKey, Record]:
    """Returns the last record of each key; a last line without its newline was torn by a kill and is left out."""
    if not path.exists():
        return {}
    *lines, _torn = path.read_bytes().split(b"\n")
    records: dict[RecordKey, Record] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = Record.model_validate_json(line)
        except ValidationError as error:
            raise RecordError(f"{path}: line {number} is damaged; remove that line to ask for it again") from error
        records[record.key] = record
    return records


class RecordWriter:
    """Appends records, each one line and one write."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def append(self, record: Record) -> None:
        """Raises RecordError where the disk does not take the whole line; the part it took is removed."""
        line = record.model_dump_json(exclude_none=True).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes fit")
        except OSError as error:
            self._file.truncate(start)
            raise RecordError(
                f"{self._file.name}: a record could not be written ({error.strerror}); "
                "free space on that disk and repeat the command: it continues where it stopped"
            ) from error


@contextmanager
def record_writer(directory: Path) -> Iterator[RecordWriter]:
    """Opens the record file for this process alone and cuts a torn last line off. Raises RecordError when in use."""
    path = directory / RECORDS_NAME
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordError(f"{directory}: another run writes here; wait for it or give another --out") from error
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.seek(0, os.SEEK_END)
        yield RecordWriter(file)


def _read_header(path: Path) -> RunHeader:
    try:
        return RunHeader.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise RecordError(f"{path.parent}: no {HEADER_NAME}; give a directory that `run --out` made") from error
    except ValidationError as error:
        raise RecordError(f"{path}: not a run header of this version: {error.errors()[0]['msg']}") from error


def _refuse_other_inputs(directory: Path, found: RunHeader, wanted: RunHeader) -> None:
    old, new = (header.model_dump(exclude={"url", "served"}) for header in (found, wanted))
    changed = [f"{name} was {old[name]!r}, is now {new[name]!r}" for name in old if old[name] != new[name]]
    if changed:
        what = "; ".join(changed)
        raise RecordError(f"{directory}: made from other inputs ({what}); give --out another directory")


def _refuse_other_revisions(directory: Path, found: RunHeader, wanted: RunHeader) -> None:
    pairs = {arm: (found.served.get(arm), wanted.served.get(arm)) for arm in wanted.arms}
    changed = [
        f"{arm} was {old or 'not told'}, is now {new or 'not told'}" for arm, (old, new) in pairs.items() if old != new
    ]
    if changed:
        raise RecordError(
            f"{directory}: holds replies of other revisions than are served (served: {'; '.join(changed)}); "
            "give --out another directory, or serve the former revisions again"
        )
