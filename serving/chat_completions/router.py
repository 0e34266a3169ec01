"""The chat completions route."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from serving.chat_completions.protocol import ChatChunk, ChatCompletion, ChatRequest
from serving.chat_completions.service import chunks, plan_chat, reply
from serving.openapi import events_of
from serving.respond import Resource, Responder

CHAT = Resource(plan_chat, reply, chunks)


def chat_router(responder: Responder) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=events_of(ChatChunk))
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        return await responder.respond(CHAT, body, request)

    return router
