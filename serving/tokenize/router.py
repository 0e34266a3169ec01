"""The tokenize route."""

from __future__ import annotations

from fastapi import APIRouter, Request

from serving.disconnect import unless_gone
from serving.generation import Generation
from serving.middleware import facts_of
from serving.tokenize.protocol import TokenizeRequest, TokenizeResponse
from serving.tokenize.service import tokenize


def tokenize_router(generation: Generation) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def create_tokenization(body: TokenizeRequest, request: Request) -> TokenizeResponse:
        engine = generation.engine()
        planning = generation.plan(lambda: tokenize(body, generation.catalog, engine.context_length))
        response = await unless_gone(request.receive, planning)
        facts_of(request).model = generation.catalog.resolve(body.model).name
        return response

    return router
