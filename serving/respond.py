"""The responder: takes a lease on a model, plans one completion on it, and answers whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel

from serving.answer import Plan, within_key
from serving.disconnect import unless_gone
from serving.engine.completion import Piece
from serving.engine.vocabulary import Vocabulary
from serving.errors import DeadlineExceeded
from serving.generation import Generation
from serving.middleware import RequestFacts, facts_of
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel
from serving.registry.lease import Lease
from serving.registry.registry import Registry
from serving.sampling import SamplingFields
from serving.shadow import ShadowJob, Shadows
from serving.sse import EventStream, events

ROUTING_HEADER = "x-routing-key"


Body = TypeVar("Body", bound=SamplingFields)
Planned = TypeVar("Planned", bound=Plan)


@dataclass(frozen=True, slots=True)
class Resource(Generic[Body, Planned]):
    """What chat and text completions do each in its own way; the int is the context in tokens."""

    plan: Callable[[Body, ServedModel, LoadedBase, int], Planned]
    fold: Callable[[Planned, AsyncGenerator[Piece, None], Vocabulary], Coroutine[Any, Any, BaseModel]]
    chunks: Callable[[Planned, AsyncGenerator[Piece, None], Vocabulary], AsyncGenerator[str, None]]


class Responder:
    """Answers a request by the revision it began with, whatever is promoted or retired meanwhile."""

    def __init__(self, generation: Generation, registry: Registry, shadows: Shadows) -> None:
        self.generation = generation
        self._registry = registry
        self._shadows = shadows

    async def respond(self, resource: Resource[Body, Planned], body: Body, request: Request) -> Response:
        """Holds one lease until the response, its stream or its failure has ended."""
        facts = facts_of(request)
        engine = self.generation.engine()
        body.check_features(engine.features)
        lease = self._lease(body, request)
        facts.model, facts.arm, facts.revision = lease.model.name, lease.arm or "", lease.model.revision
        with ExitStack() as held:
            held.callback(lease.release)
            self.generation.refuse_when_full()
            plan = partial(self._plan, resource, body, engine.context_length, facts.body_bytes)
            async with unless_gone(request.receive):
                planned = await _plan_when_ready(lease, plan, facts)
                choices, prompt_tokens = planned.choices, planned.prompt_tokens
                pieces = self.generation.run(lease.model, choices, prompt_tokens, facts, buffered=body.stream)
                if lease.shadow is not None:
                    pieces = self._shadows.watch(pieces, ShadowJob(lease.shadow, planned, plan, facts))
                headers, vocabulary = planned.identity.headers(lease.arm), self._registry.base.vocabulary
                if not body.stream:
                    whole = await resource.fold(planned, pieces, vocabulary)
                    return Response(whole.model_dump_json(), 200, headers, "application/json")
                texts = resource.chunks(planned, pieces, vocabulary)
                stream = _leased(events(texts, facts.note_stream_error), lease)
                first = await anext(stream)
            held.pop_all()  # the stream has begun, so its end releases
            return EventStream(first, stream, headers)

    def _lease(self, body: SamplingFields, request: Request) -> Lease:
        with within_key(facts_of(request).caller, body.model):
            return self._registry.lease(body.model, body.routing_key or request.headers.get(ROUTING_HEADER))

    async def _plan(
        self, resource: Resource[Body, Planned], body: Body, context_length: int, size: int, model: ServedModel
    ) -> Planned:
        base = self._registry.base
        return await self.generation.plan(lambda: resource.plan(body, model, base, context_length), size)


async def _plan_when_ready(
    lease: Lease, plan: Callable[[ServedModel], Awaitable[Planned]], facts: RequestFacts
) -> Planned:
    """Raises DeadlineExceeded where the engine has no place for the weights in the request's time."""
    try:
        async with asyncio.timeout(facts.left_s()):
            await lease.ready()
            return await plan(lease.model)
    except TimeoutError:
        raise DeadlineExceeded(
            f"the weights of {lease.model.revision} were not ready in the time that the request may take; ask again, "
            "or raise x-request-timeout-s"
        ) from None


async def _leased(stream: AsyncGenerator[bytes, None], lease: Lease) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(stream):
            async for event in stream:
                yield event
    finally:
        lease.release()
