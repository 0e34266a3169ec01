"""Administration on the wire: what is asked, and revisions, labels, policies and shadows as they are told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from serving.errors import BadRequest
from serving.shadow_log import ShadowComparison
from serving.wire import Text, Wire


class RegisterRequest(Wire):
    """Exactly one of `path`, relative to an adapter root, and `hub_id`."""

    name: Text
    path: Text | None = None
    hub_id: Text | None = None
    hub_revision: Text | None = None
    label: Text | None = None

    @model_validator(mode="after")
    def _one_source(self) -> RegisterRequest:
        if (self.path is None) == (self.hub_id is None):
            raise BadRequest("give either path or hub_id, not both and not none", param="path")
        if self.hub_revision is not None and self.hub_id is None:
            raise BadRequest("hub_revision needs hub_id; give it or remove hub_revision", param="hub_revision")
        return self


class PromoteRequest(Wire):
    """`expected` begins the digest that the label must have now, so that two administrators cannot undo each other."""

    digest: Text
    expected: Text | None = None


class PolicyRequest(Wire):
    weights: dict[Text, int] = Field(min_length=1)
    sticky: bool = False
    shadow: Text | None = None


class ProbeView(BaseModel):
    """The distances are means over `tokens` scored ids, in nats."""

    reference: str
    tokens: int
    from_base_nats: float
    from_reference_nats: float | None
    allowed_nats: float | None


class RevisionView(BaseModel):
    """`in_flight` counts requests that use it now; `resident` says whether the engine holds its weights."""

    object: Literal["revision"] = "revision"
    id: str  # name@digest, as responses call it
    name: str
    digest: str  # sha256
    status: str  # admitted, retiring, retired or broken
    reasons: list[str]  # why it is broken
    labels: list[str]
    pinned: bool
    resident: bool
    in_flight: int
    created: float  # seconds since 1970
    rank: int
    load_s: float | None
    probe: ProbeView | None


class ManifestView(BaseModel):
    """What the adapter's manifest says of its making."""

    base: str
    base_revision: str | None
    dataset: str
    rows_train: int
    quantisation: str
    rank: int
    alpha: float
    target_modules: list[str]
    steps: int
    last_nll_nats: float
    git_revision: str | None


class InspectedRevision(RevisionView):
    manifest: ManifestView | None  # null for one that is not admitted


class RefusalView(BaseModel):
    """An adapter that the gate turned away."""

    name: str
    source: str
    reasons: list[str]
    refused: float  # seconds since 1970


class RevisionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[RevisionView]
    refusals: list[RefusalView]  # the newest first


class LabelView(BaseModel):
    object: Literal["label"] = "label"
    id: str  # name:label
    name: str
    label: str
    digest: str
    previous: str | None  # where a rollback leads
    changed: float  # seconds since 1970


class LabelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[LabelView]


class PolicyView(BaseModel):
    object: Literal["policy"] = "policy"
    name: str
    weights: dict[str, int]
    sticky: bool
    shadow: str | None


class Deleted(BaseModel):
    id: str
    deleted: Literal[True] = True


class ShadowReport(BaseModel):
    """`outcomes` counts requests since the server's start; `comparisons` fold the log, which outlives it."""

    object: Literal["shadow_report"] = "shadow_report"
    name: str
    outcomes: dict[str, int]
    comparisons: list[ShadowComparison]
