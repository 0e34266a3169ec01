"""The tokenize route."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request

from serving.answer import within_key
from serving.disconnect import unless_gone
from serving.generation import Generation
from serving.middleware import facts_of
from serving.registry.registry import Registry
from serving.tokenize.protocol import TokenizeRequest, TokenizeResponse
from serving.tokenize.service import tokenize


def tokenize_router(generation: Generation, registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def create_tokenization(body: TokenizeRequest, request: Request) -> TokenizeResponse:
        """Renders as the revision does that the model means now; a policy's draw is left out."""
        facts = facts_of(request)
        engine = generation.engine()
        with within_key(facts.caller, body.model):
            model = registry.resolve(body.model)
        facts.model = model.name
        async with unless_gone(request.receive):
            make = partial(tokenize, body, model, registry.base, engine.context_length)
            return await generation.plan(make, facts.body_bytes)

    return router
