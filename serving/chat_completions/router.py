"""The chat completions route."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from serving.chat_completions.protocol import ChatRequest
from serving.chat_completions.service import chunks, plan_chat, reply
from serving.disconnect import unless_gone
from serving.generation import Generation
from serving.middleware import facts_of
from serving.sse import EventStream, events


def chat_router(generation: Generation) -> APIRouter:
    router = APIRouter()
    vocabulary = generation.catalog.base.vocabulary

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        facts = facts_of(request)
        engine = generation.engine()
        planning = generation.plan(lambda: plan_chat(body, generation.catalog, engine.context_length))
        plan = await unless_gone(request.receive, planning)
        facts.model = plan.identity.model.name
        pieces = generation.run(plan.identity.model, plan.choices, plan.prompt_tokens, facts)
        headers = plan.identity.headers()
        if not body.stream:
            completion = await unless_gone(request.receive, reply(plan, pieces, vocabulary))
            return Response(completion.model_dump_json(), 200, headers, "application/json")
        stream = events(chunks(plan, pieces, vocabulary), lambda error: generation.stream_failed(error.code, facts))
        first = await unless_gone(request.receive, anext(stream))
        return EventStream(first, stream, headers)

    return router
