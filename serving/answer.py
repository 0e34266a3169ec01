"""The answer's identity: its id, time, model revision and fingerprint, the same in every chunk and in the headers."""

from __future__ import annotations

import functools
import importlib.metadata
import time
import uuid
from dataclasses import dataclass

from serving.registry.catalog import ServedModel

MIN_LOGPROB = -9999.0  # OpenAI's number for "very unlikely"; JSON has no -inf


@dataclass(frozen=True, slots=True)
class Identity:
    id: str
    created: int  # seconds since 1970
    model: ServedModel
    fingerprint: str

    def headers(self) -> dict[str, str]:
        return {"x-adapter-revision": self.model.revision} if self.model.is_adapter else {}


def identify(prefix: str, model: ServedModel) -> Identity:
    fingerprint = f"graft-{_version()}-{model.digest}"
    return Identity(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, fingerprint)


@functools.cache
def _version() -> str:
    return importlib.metadata.version("graft")
