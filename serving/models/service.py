"""The model listing: what the registry serves, as OpenAI's objects."""

from __future__ import annotations

from serving.auth import Caller
from serving.models.protocol import Model, ModelList
from serving.registry.catalog import ServedModel
from serving.registry.registry import Registry
from serving.registry.revision import DIGEST_CHARACTERS


def list_models(registry: Registry, caller: Caller | None) -> ModelList:
    """`caller` None may use all."""
    served = [model for model in registry.served() if caller is None or caller.allows(model.name)]
    return ModelList(data=[describe(registry, model, model.name) for model in served])


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
    )
