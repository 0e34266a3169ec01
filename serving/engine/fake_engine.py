"""The fake engine: a deterministic language model made of hashes, with the whole contract and no weights."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence, Set
from contextlib import aclosing
from dataclasses import replace

from serving.engine.engine import (
    Delta,
    EngineStats,
    Feature,
    FinishReason,
    GenerationRequest,
    Sampling,
    TokenLogprob,
    Variant,
)
from serving.errors import EngineDead, ModelNotFound

CANDIDATES = 24  # tokens that can be drawn at a position
DECAY_NATS = 0.4  # from one candidate to the next
TAIL_MASS = 1e-6  # spread over all other tokens, which are never drawn
MEAN_REPLY_TOKENS = 24


class FakeEngine:
    """The next token's distribution is a hash of the variant's digest and all ids before it.

    `end_of_turn_id` is the likeliest token at one position in MEAN_REPLY_TOKENS. The `control_ids` come at no other: a
    reply without an end of turn has no end of its own. `script` gives the likeliest tokens of every completion, in
    order. `die` makes the engine fail; `aborted` counts requests that were left early.
    """

    simulated = True
    weights_cost = None
    features: frozenset[Feature] = frozenset()  # its few candidates a position would rarely fit a grammar

    def __init__(
        self,
        *,
        context_length: int,
        vocabulary_size: int,
        max_batch: int = 32,
        token_delay_s: float = 0.0,
        start_delay_s: float = 0.0,
        end_of_turn_id: int | None = None,
        control_ids: Set[int] = frozenset(),
        script: Sequence[int] = (),
    ) -> None:
        self.context_length = context_length
        self.max_batch = max_batch
        self.aborted = 0
        self._vocabulary_size = vocabulary_size
        self._token_delay_s = token_delay_s
        self._start_delay_s = start_delay_s
        self._end_of_turn_id = end_of_turn_id
        self._control_ids = frozenset(control_ids)
        self._script = tuple(script)
        candidates = min(CANDIDATES, vocabulary_size - len(self._control_ids) - 1)
        self._logprobs, self._tail_logprob = _rank_logprobs(candidates, vocabulary_size)
        self._rows = asyncio.Semaphore(max_batch)
        self._variants: set[str] = set()
        self._running = self._waiting = self._steps = 0
        self._dead: str | None = "it has not started"

    async def start(self) -> None:
        await asyncio.sleep(self._start_delay_s)
        self._dead = None

    async def stop(self) -> None:
        self.die("it was stopped")

    def die(self, reason: str = "it was told to") -> None:
        """Makes running and later requests raise EngineDead."""
        self._dead = reason

    async def add(self, variant: Variant) -> None:
        self._variants.add(variant.digest)

    async def remove(self, variant: Variant) -> None:
        self._variants.discard(variant.digest)

    def stats(self) -> EngineStats:
        return EngineStats(running=self._running, waiting=self._waiting, steps=self._steps)

    def healthy(self) -> bool:
        return self._dead is None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self._check_alive()
        if request.variant.digest not in self._variants:
            raise ModelNotFound(f"variant {request.variant.name} was not added to the engine")
        ended, came_s = False, time.perf_counter()
        await self._take_row()
        waited_s: float | None = time.perf_counter() - came_s
        try:
            async with aclosing(self._deltas(request)) as deltas:
                async for delta in deltas:
                    ended = delta.finish_reason is not None
                    yield replace(delta, waited_s=waited_s)
                    waited_s = None
        except EngineDead:
            ended = True
            raise
        finally:
            self._running -= 1
            self._rows.release()
            self.aborted += not ended

    async def _take_row(self) -> None:
        self._waiting += 1
        try:
            await self._rows.acquire()
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self._waiting -= 1
        self._running += 1

    async def _deltas(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        prefix, prompt_logprobs = await self._read_prompt(request)
        room = min(request.sampling.max_tokens, self.context_length - len(request.prompt_ids))
        if room <= 0:
            yield Delta(prompt_logprobs=prompt_logprobs, finish_reason=FinishReason.LENGTH)
            return
        drawn: Counter[int] = Counter()
        for position in range(room):
            await self._step()
            ranked = self._candidates(prefix, position)
            token_id = self._draw(ranked, prefix, request.sampling, drawn)
            if token_id in request.sampling.stop_token_ids:
                yield Delta(prompt_logprobs=prompt_logprobs, finish_reason=FinishReason.STOP)
                return
            logprobs = () if request.logprobs is None else (self._entry(ranked, token_id, request.logprobs),)
            reason = FinishReason.LENGTH if position == room - 1 else None
            yield Delta((token_id,), logprobs, prompt_logprobs, reason)
            prompt_logprobs = None
            drawn[token_id] += 1
            prefix = _extend(prefix, token_id)

    async def _read_prompt(
        self, request: GenerationRequest
    ) -> tuple[hashlib.blake2b, tuple[TokenLogprob | None, ...] | None]:
        await self._step()
        prefix = hashlib.blake2b(request.variant.digest.encode(), digest_size=16)
        entries: list[TokenLogprob | None] = []
        for position, token_id in enumerate(request.prompt_ids):
            if request.prompt_logprobs is not None:
                ranked = self._candidates(prefix, None)
                entries.append(self._entry(ranked, token_id, request.prompt_logprobs) if position else None)
            prefix = _extend(prefix, token_id)
        return prefix, tuple(entries) if request.prompt_logprobs is not None else None

    async def _step(self) -> None:
        await asyncio.sleep(self._token_delay_s)
        self._check_alive()
        self._steps += 1

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(f"the fake engine cannot answer: {self._dead}")

    def _candidates(self, prefix: hashlib.blake2b, position: int | None) -> list[int]:
        """Returns the ids that can come next, likeliest first; `position` counts completion tokens."""
        number = int.from_bytes(prefix.digest())
        drawn = random.Random(number).sample(range(self._vocabulary_size), len(self._logprobs) + len(self._control_ids))
        ranked = [token_id for token_id in drawn if token_id not in self._control_ids][: len(self._logprobs)]
        if position is not None and position < len(self._script):
            first: int | None = self._script[position]
        else:
            first = self._end_of_turn_id if number % MEAN_REPLY_TOKENS == 0 else None
        if first is None:
            return ranked
        return [first, *(token_id for token_id in ranked if token_id != first)][: len(self._logprobs)]

    def _entry(self, ranked: Sequence[int], token_id: int, count: int) -> TokenLogprob:
        rank = ranked.index(token_id) if token_id in ranked else None
        logprob = self._tail_logprob if rank is None else self._logprobs[rank]
        return TokenLogprob(token_id, logprob, tuple(zip(ranked, self._logprobs, strict=True))[:count])

    def _draw(self, ranked: Sequence[int], prefix: hashlib.blake2b, sampling: Sampling, drawn: Counter[int]) -> int:
        bias = dict(sampling.logit_bias)
        others = [token_id for token_id in bias if token_id not in ranked]
        ranked = [*ranked, *others]
        scores = [
            logprob
            + bias.get(token_id, 0.0)
            - sampling.frequency_penalty * drawn[token_id]
            - sampling.presence_penalty * (drawn[token_id] > 0)
            for token_id, logprob in zip(ranked, self._logprobs + [self._tail_logprob] * len(others), strict=True)
        ]
        order = sorted(range(len(ranked)), key=lambda rank: -scores[rank])
        if sampling.temperature == 0:
            return ranked[order[0]]
        weights = [math.exp((scores[rank] - scores[order[0]]) / sampling.temperature) for rank in order]
        kept = _nucleus(weights, sampling.top_p)
        generator = random.Random(f"{prefix.hexdigest()}/{sampling.seed}")
        return ranked[generator.choices(order[:kept], weights[:kept])[0]]


def _extend(prefix: hashlib.blake2b, token_id: int) -> hashlib.blake2b:
    longer = prefix.copy()
    longer.update(token_id.to_bytes(4))
    return longer


def _rank_logprobs(count: int, vocabulary_size: int) -> tuple[list[float], float]:
    """Returns the log-probability of each of `count` candidates by rank, and that of every other token."""
    weights = [math.exp(-DECAY_NATS * rank) for rank in range(count)]
    scale = math.log((1 - TAIL_MASS) / math.fsum(weights))
    return [-DECAY_NATS * rank + scale for rank in range(count)], math.log(TAIL_MASS / (vocabulary_size - count))


def _nucleus(weights: Sequence[float], top_p: float) -> int:
    """Returns how many of the descending `weights` hold `top_p` of their sum; at least one."""
    reached, wanted = 0.0, top_p * math.fsum(weights)
    for count, weight in enumerate(weights, start=1):
        reached += weight
        if reached >= wanted:
            return count
    return len(weights)
