"""The model listing: what the registry serves, as OpenAI's objects."""

from __future__ import annotations

from dataclasses import asdict

from serving.auth import Caller
from serving.engine.engine import VariantKind
from serving.models.protocol import Model, ModelList, WeightsCost
from serving.registry.catalog import ServedModel
from serving.registry.registry import Registry
from serving.registry.revision import DIGEST_CHARACTERS


def list_models(registry: Registry, caller: Caller | None) -> ModelList:
    """`caller` None may use all."""
    served = registry.served().items()
    allowed = [(model_id, model) for model_id, model in served if caller is None or caller.allows(model.name)]
    return ModelList(data=[describe(registry, model, model_id) for model_id, model in allowed])


def describe(registry: Registry, served: ServedModel, model_id: str) -> Model:
    """`model_id` is the name as the client wrote it, with or without a label or digest."""
    labels = {each.label: each.digest for each in registry.labels() if each.name == served.name}
    return Model(
        id=model_id,
        created=served.created,
        kind=served.variant.kind.value,
        revision=served.revision,
        digest=served.variant.digest,
        parent=served.parent,
        labels={label: f"{served.name}@{digest[:DIGEST_CHARACTERS]}" for label, digest in labels.items()},
        weights=served.weights.value,
        weights_cost=_cost(registry) if served.variant.kind is VariantKind.BASE else None,
    )


def _cost(registry: Registry) -> WeightsCost | None:
    cost = registry.weights_cost()
    return None if cost is None else WeightsCost(**asdict(cost))
