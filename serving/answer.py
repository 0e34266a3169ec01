"""The answer's identity: its id, time, model revision and fingerprint, the same in every chunk and in the headers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from serving.auth import ANY_MODEL, Caller
from serving.engine.completion import Choice
from serving.engine.engine import WeightFormat
from serving.errors import ModelNotFound
from serving.registry.catalog import ServedModel
from serving.version import graft_version

MIN_LOGPROB = -9999.0  # OpenAI's number for "very unlikely"; JSON has no -inf


@dataclass(frozen=True, slots=True)
class Identity:
    id: str
    created: int  # seconds since 1970
    model: ServedModel
    fingerprint: str

    def headers(self, label: str | None) -> dict[str, str]:
        """`label` is the one that routed here; a model that was named by its digest, or the base, has none."""
        revision = {"x-adapter-revision": self.model.revision} if self.model.is_adapter else {}
        return revision if label is None else {**revision, "x-adapter-label": label}


class Plan(Protocol):
    """All that is decided of a completion before the engine is asked."""

    @property
    def identity(self) -> Identity: ...

    @property
    def choices(self) -> tuple[Choice, ...]: ...

    @property
    def prompt_tokens(self) -> int: ...


@contextmanager
def within_key(caller: Caller | None, model: str) -> Iterator[None]:
    """Raises Forbidden for a model that the key may not use, and tells a key of some models nothing of the others."""
    if caller is not None:
        caller.check_model(model)
    try:
        yield
    except ModelNotFound:
        if caller is None or ANY_MODEL in caller.models:
            raise
        raise ModelNotFound(
            f"model {model[:200]!r} does not exist; GET /v1/models lists what the key may use", param="model"
        ) from None


def identify(prefix: str, model: ServedModel) -> Identity:
    weights = "" if model.weights is WeightFormat.PLAIN else f"-{model.weights.value}"
    fingerprint = f"graft-{graft_version()}-{model.digest}{weights}"
    return Identity(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, fingerprint)
