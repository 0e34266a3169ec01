"""The revision: one adapter's files under one name, and what the registry knows of them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

DIGEST_CHARACTERS = 12  # as many as a revision shows


class RevisionStatus(enum.Enum):
    ADMITTED = "admitted"  # passed the gate; may answer
    RETIRING = "retiring"  # takes no new request; the running ones end
    RETIRED = "retired"  # its files are gone
    BROKEN = "broken"  # its files no longer verify, or do not fit the base that runs now


class Reference(enum.Enum):
    MATCHED = "matched"  # the engine computes what peft computed after the training
    NONE = "none"  # the adapter brings no probes
    SIMULATED = "simulated"  # the engine has no weights to compare


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the gate measured; the distances are means over `tokens` scored ids, in nats."""

    reference: Reference
    tokens: int
    from_base_nats: float
    from_reference_nats: float | None = None
    allowed_nats: float | None = None


@dataclass(frozen=True, slots=True)
class Revision:
    """`reasons` say why it is broken; `load_s` is how long the engine took to load it at the gate."""

    name: str
    digest: str  # sha256 over the hashes of its files, see AdapterManifest.digest
    status: RevisionStatus
    created: float  # when it was registered first, seconds since 1970
    rank: int
    manifest_sha256: str
    pinned: bool = False
    reasons: tuple[str, ...] = ()
    load_s: float | None = None
    probe: ProbeResult | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.digest

    @property
    def id(self) -> str:
        return f"{self.name}@{self.digest[:DIGEST_CHARACTERS]}"

    @property
    def live(self) -> bool:
        """Whether its files are kept."""
        return self.status is not RevisionStatus.RETIRED


@dataclass(frozen=True, slots=True)
class Label:
    """An alias `name:label`; `previous` is where a roll-back leads."""

    name: str
    label: str
    digest: str
    changed: float  # seconds since 1970
    previous: str | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """An adapter that the gate turned away."""

    name: str
    source: str
    reasons: tuple[str, ...]
    refused: float  # seconds since 1970
