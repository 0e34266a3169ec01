"""The shadow: a second revision answers a request again, off the path, and what differs is recorded."""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from serving.answer import Plan
from serving.engine.completion import Piece, complete_all
from serving.engine.engine import Engine, EngineStats, FinishReason
from serving.errors import GraftError
from serving.generation import Generation
from serving.metrics import Metrics
from serving.middleware import RequestFacts
from serving.registry.catalog import ServedModel
from serving.registry.registry import Registry
from serving.shadow_log import ShadowLog, ShadowRecord, ShadowSide, common_prefix

logger = logging.getLogger("graft.shadow")
MAX_SHADOWS = 4  # that run at once


class ShadowOutcome(enum.Enum):
    RECORDED = "recorded"
    BUSY = "busy"  # no free rows, no free place for its weights, or MAX_SHADOWS run: dropped before it began
    PREEMPTED = "preempted"  # left in the middle, since a request waited for a row
    UNANSWERED = "unanswered"  # the answer itself failed, or its client left before its end
    FAILED = "failed"  # the shadow revision is gone, refused the request or broke


@dataclass(frozen=True, slots=True)
class ShadowJob:
    """A request that `shadow` (name@digest) answers too. `plan` decides it for another revision of the model."""

    shadow: str
    answered: Plan
    plan: Callable[[ServedModel], Awaitable[Plan]]
    facts: RequestFacts


class Preempted(Exception):
    """A request waits for the row that a shadow has."""


class Shadows:
    """Runs shadows where rows are free; they count for no key's limits, and leave their rows to who waits for one.

    A shadow begins when the answer has ended whole, so its client may leave then; it is dropped, and counted, where
    the server is busy. It evicts no weights: a revision that always has to be there is pinned.
    """

    def __init__(
        self, generation: Generation, registry: Registry, metrics: Metrics, log: ShadowLog, *, max_batch: int
    ) -> None:
        self._generation = generation
        self._registry = registry
        self._metrics = metrics
        self._max_batch = max_batch
        self._tasks: set[asyncio.Task[None]] = set()
        self._outcomes: dict[str, Counter[ShadowOutcome]] = {}
        self.log = log

    async def watch(self, pieces: AsyncGenerator[Piece, None], job: ShadowJob) -> AsyncGenerator[Piece, None]:
        """Yields the answer's pieces as they are, and begins its shadow after the last."""
        answer = Transcript(len(job.answered.choices))
        whole = False
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    answer.see(piece)
                    yield piece
            whole = True
            if job.facts.queue_s is not None:
                answer.row_at_s = job.facts.arrived_s + job.facts.queue_s
        finally:
            if not whole:
                self._count(job, ShadowOutcome.UNANSWERED)
        self._begin(job, answer)

    def outcomes(self, name: str) -> dict[str, int]:
        """Returns what became of a name's shadows since the start."""
        counted = self._outcomes.get(name, Counter())
        return {outcome.value: counted[outcome] for outcome in ShadowOutcome}

    async def close(self) -> None:
        """Ends the shadows that run."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, job: ShadowJob, answer: Transcript) -> None:
        if len(self._tasks) >= MAX_SHADOWS:
            self._count(job, ShadowOutcome.BUSY)
            return
        task = asyncio.create_task(self._run(job, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: ShadowJob, answer: Transcript) -> None:
        try:
            outcome = await self._answer_and_record(job, answer)
        except Preempted:
            outcome = ShadowOutcome.PREEMPTED
        except (GraftError, OSError) as error:
            logger.warning("the shadow of request %s failed: %s", job.facts.request_id, error)
            outcome = ShadowOutcome.FAILED
        except Exception:  # a bug; it must not take the server's other shadows with it
            logger.exception("the shadow of request %s failed", job.facts.request_id)
            outcome = ShadowOutcome.FAILED
        self._count(job, outcome)

    async def _answer_and_record(self, job: ShadowJob, answer: Transcript) -> ShadowOutcome:
        engine, rows = self._generation.engine(), len(job.answered.choices)
        if not self._has_room(engine, rows):
            return ShadowOutcome.BUSY
        lease = self._registry.lease(job.shadow)
        try:
            if not self._registry.residency.has_place(lease.model.variant.digest):
                return ShadowOutcome.BUSY
            await lease.ready()
            plan = await job.plan(lease.model)
            if not self._has_room(engine, rows):  # any more
                return ShadowOutcome.BUSY
            shadow = await self._answer(engine, plan, job.facts.timeout_s)
        finally:
            lease.release()
        records = _records(job, answer, plan, shadow)
        await asyncio.to_thread(self.log.append, job.answered.identity.model.name, records)
        return ShadowOutcome.RECORDED

    def _has_room(self, engine: Engine, rows: int) -> bool:
        stats = engine.stats()
        return not stats.waiting and stats.running + rows <= self._max_batch

    async def _answer(self, engine: Engine, plan: Plan, within_s: float | None) -> Transcript:
        transcript = Transcript(len(plan.choices))
        vocabulary = self._registry.base.vocabulary
        waiting_since: int | None = None
        async with aclosing(complete_all(engine, vocabulary, plan.choices, within_s)) as pieces:
            async for piece in pieces:
                transcript.see(piece)
                waiting_since = _still_waiting(engine.stats(), waiting_since)
        return transcript

    def _count(self, job: ShadowJob, outcome: ShadowOutcome) -> None:
        name = job.answered.identity.model.name
        self._outcomes.setdefault(name, Counter())[outcome] += 1
        self._metrics.shadows.labels(name, outcome.value).inc()


@dataclass(slots=True)
class _Said:
    """One choice, token by token."""

    token_ids: list[int] = field(default_factory=list)
    first_at_s: float | None = None
    ended_at_s: float = 0.0
    finish_reason: FinishReason | None = None


class Transcript:
    """What an answer's pieces said and when; `row_at_s` is when the first of its choices had a row in the batch."""

    def __init__(self, choices: int) -> None:
        self.row_at_s = time.perf_counter()
        self._said = [_Said() for _ in range(choices)]
        self._begun = False

    def see(self, piece: Piece) -> None:
        now_s = time.perf_counter()
        if not self._begun:
            self._begun = True
            self.row_at_s += piece.waited_s or 0.0
        said = self._said[piece.index]
        said.token_ids += piece.token_ids
        if piece.token_ids and said.first_at_s is None:
            said.first_at_s = now_s
        if piece.finish_reason is not None:
            said.finish_reason, said.ended_at_s = piece.finish_reason, now_s

    def token_ids(self, index: int) -> Sequence[int]:
        return self._said[index].token_ids

    def side(self, index: int, plan: Plan) -> ShadowSide:
        said = self._said[index]
        assert said.finish_reason is not None  # `complete` raises where the engine gave none
        return ShadowSide(
            revision=plan.identity.model.revision,
            prompt_tokens=len(plan.choices[index].request.prompt_ids),
            completion_tokens=len(said.token_ids),
            finish_reason=said.finish_reason.value,
            ttft_s=None if said.first_at_s is None else said.first_at_s - self.row_at_s,
            seconds=said.ended_at_s - self.row_at_s,
        )


def _still_waiting(stats: EngineStats, since: int | None) -> int | None:
    """Returns the step since which requests wait; raises Preempted where one had no room in a whole step."""
    if not stats.waiting:
        return None
    if since is not None and stats.steps > since + 1:
        raise Preempted
    return stats.steps if since is None else since


def _records(job: ShadowJob, answer: Transcript, plan: Plan, shadow: Transcript) -> list[ShadowRecord]:
    records = []
    for choice in plan.choices:
        ours, theirs = answer.side(choice.index, job.answered), shadow.side(choice.index, plan)
        shared = common_prefix(answer.token_ids(choice.index), shadow.token_ids(choice.index))
        records.append(
            ShadowRecord(
                time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                request_id=job.facts.request_id,
                choice=choice.index,
                temperature=choice.request.sampling.temperature,
                answered=ours,
                shadow=theirs,
                common_prefix_tokens=shared,
                equal=ours.completion_tokens == theirs.completion_tokens == shared
                and ours.finish_reason == theirs.finish_reason,
            )
        )
    return records
