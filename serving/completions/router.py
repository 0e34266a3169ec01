"""The text completions route."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from serving.completions.protocol import Completion, CompletionRequest
from serving.completions.service import chunks, completion, plan_completion
from serving.openapi import events_of
from serving.respond import Resource, Responder

TEXT = Resource(plan_completion, completion, chunks)


def completions_router(responder: Responder) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", response_model=Completion, responses=events_of(Completion))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        responder.generation.refuse_too_many(len(body.prompt) * body.n)
        return await responder.respond(TEXT, body, request)

    return router
