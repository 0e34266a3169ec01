"""The model on the wire: OpenAI's object, and what is known of its revision."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class WeightsCost(BaseModel):
    """What the format costs, beside the plain weights: means over the `tokens` of fixed replies."""

    tokens: int
    kl_nats: float
    top1_agreement: float
    nll_nats: float  # added to the replies'


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int  # seconds since 1970
    owned_by: Literal["graft"] = "graft"
    kind: str  # base, adapter or merged
    revision: str  # what responses will call it
    digest: str  # sha256
    parent: str | None  # an adapter's base
    labels: dict[str, str]  # of the name, and the revision that each points at
    weights: str  # plain, nf4 or fp16: how they, or an adapter's base, are kept
    weights_cost: WeightsCost | None  # of a base in fp16, once it has loaded


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
