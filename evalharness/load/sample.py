"""The raw sample of one load request: a line of load_samples.jsonl."""

from __future__ import annotations

import enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

SAMPLES_NAME = "load_samples.jsonl"


class SampleStatus(enum.StrEnum):
    OK = "ok"
    HTTP_ERROR = "http_error"  # any status but 200
    STREAM_ERROR = "stream_error"  # an error event inside the stream
    BROKEN_STREAM = "broken_stream"  # not JSON, or it ended before [DONE]
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    CUT_OFF = "cut_off"  # still running when the test had drained
    NOT_SENT = "not_sent"  # open loop: it arrived, and no user was free before the end


class LoadSample(BaseModel):
    """`scheduled` and `start` are Unix times in seconds; durations are None where the request did not get that far."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenario: str
    arm: str
    scheduled: float | None  # open loop: the arrival, whether or not a user was free
    start: float | None
    ttft_s: float | None = None  # to the first content delta; a reply may be whole and empty
    tpot_s: float | None = None  # (last content delta - first) / (tokens - 1)
    e2e_s: float | None = None  # to the end of the stream, or to the failure
    completion_tokens: int | None = None
    status: SampleStatus
    http_status: int | None = None
    error: str | None = None

    @property
    def kind(self) -> str:
        """What an error is counted as."""
        return f"http_{self.http_status}" if self.status is SampleStatus.HTTP_ERROR else self.status.value

    @property
    def queued_s(self) -> float | None:
        """How long the arrival waited for a free user; None in a closed loop, which hides that wait."""
        return None if self.scheduled is None or self.start is None else self.start - self.scheduled


class SampleTail:
    """Reads a growing sample file piece by piece, so that watching a long test costs no more than a short one."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._line = path, 0, 0

    def read(self) -> list[LoadSample]:
        """Returns the samples of the whole lines since the last look; raises ValueError naming a bad line."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        return [self._parse(line) for line in whole.splitlines()]

    def _parse(self, line: bytes) -> LoadSample:
        self._line += 1
        try:
            return LoadSample.model_validate_json(line)
        except ValueError as error:
            raise ValueError(f"{self._path}:{self._line}: not a load sample: {error}") from error


def read_samples(path: Path) -> list[LoadSample]:
    """Reads the whole lines of a sample file; none where there is no file."""
    return SampleTail(path).read()
