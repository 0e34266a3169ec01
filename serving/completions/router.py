"""The text completions route."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from serving.completions.protocol import CompletionRequest
from serving.completions.service import chunks, completion, plan_completion
from serving.disconnect import unless_gone
from serving.generation import Generation
from serving.middleware import facts_of
from serving.sse import EventStream, events


def completions_router(generation: Generation) -> APIRouter:
    router = APIRouter()
    vocabulary = generation.catalog.base.vocabulary

    @router.post("/v1/completions")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        facts = facts_of(request)
        engine = generation.engine()
        generation.refuse_too_many(len(body.prompt) * body.n)
        planning = generation.plan(lambda: plan_completion(body, generation.catalog, engine.context_length))
        plan = await unless_gone(request.receive, planning)
        facts.model = plan.identity.model.name
        pieces = generation.run(plan.identity.model, plan.choices, plan.prompt_tokens, facts)
        headers = plan.identity.headers()
        if not body.stream:
            whole = await unless_gone(request.receive, completion(plan, pieces, vocabulary))
            return Response(whole.model_dump_json(), 200, headers, "application/json")
        stream = events(chunks(plan, pieces, vocabulary), lambda error: generation.stream_failed(error.code, facts))
        first = await unless_gone(request.receive, anext(stream))
        return EventStream(first, stream, headers)

    return router
