"""The tokenize route."""

from __future__ import annotations

from fastapi import APIRouter, Request

from serving.generation import Generation
from serving.middleware import facts_of
from serving.tokenize.protocol import TokenizeRequest, TokenizeResponse
from serving.tokenize.service import tokenize


def tokenize_router(generation: Generation) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def create_tokenization(body: TokenizeRequest, request: Request) -> TokenizeResponse:
        engine = generation.engine()
        response = tokenize(body, generation.catalog, engine.context_length)
        facts_of(request).model = generation.catalog.resolve(body.model).name
        return response

    return router
