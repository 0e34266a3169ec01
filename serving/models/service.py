"""The model listing: what the catalog serves, as OpenAI's objects."""

from __future__ import annotations

from serving.models.protocol import Model, ModelList
from serving.registry.catalog import Catalog, ServedModel


def list_models(catalog: Catalog) -> ModelList:
    return ModelList(data=[describe(served, served.name) for served in catalog])


def describe(served: ServedModel, model_id: str) -> Model:
    """`model_id` is the name as the client wrote it, with or without a digest."""
    return Model(
        id=model_id,
        created=served.created,
        kind=served.variant.kind.value,
        revision=served.revision,
        digest=served.variant.digest,
        parent=served.parent,
    )
