"""The models routes; they answer while the weights still load."""

from __future__ import annotations

from fastapi import APIRouter

from serving.models.protocol import Model, ModelList
from serving.models.service import describe, list_models
from serving.registry.catalog import Catalog


def models_router(catalog: Catalog) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def get_models() -> ModelList:
        return list_models(catalog)

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Model:
        return describe(catalog.resolve(model_id), model_id)

    return router
