"""The models routes; they answer while the weights still load."""

from __future__ import annotations

from fastapi import APIRouter, Request

from serving.answer import within_key
from serving.middleware import facts_of
from serving.models.protocol import Model, ModelList
from serving.models.service import describe, list_models
from serving.registry.registry import Registry


def models_router(registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def get_models(request: Request) -> ModelList:
        """Lists what the key may use."""
        return list_models(registry, facts_of(request).caller)

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str, request: Request) -> Model:
        """Takes `name`, `name:label` and `name@digest`."""
        with within_key(facts_of(request).caller, model_id):
            return describe(registry, registry.resolve(model_id), model_id)

    return router
