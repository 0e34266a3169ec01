"""The deltas and the step count of what vLLM hands out; its objects are read by their fields, so this needs no vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from serving.engine.engine import Delta, FinishReason, GenerationRequest, TokenLogprob
from serving.errors import EngineDead

UNLIKELY_NATS = -9999.0  # OpenAI's number for a token of probability 0: JSON has no -inf


def nothing_to_score(request: GenerationRequest) -> Delta:
    """The answer to a request that generates nothing and whose prompt has no token that another predicts."""
    wanted = request.prompt_logprobs is not None
    return Delta(prompt_logprobs=(None,) if wanted else None, finish_reason=FinishReason.LENGTH)


def score(request: GenerationRequest, output: Any) -> Delta:
    """Reads the answer to a prompt whose last token vLLM was made to generate."""
    assert request.prompt_logprobs is not None
    last = _entry(request.prompt_ids[-1], output.outputs[0].logprobs[0], request.prompt_logprobs)
    entries = _prompt_entries(request.prompt_ids[:-1], output.prompt_logprobs, request.prompt_logprobs)
    return Delta(prompt_logprobs=(*entries, last), finish_reason=FinishReason.LENGTH, waited_s=_waited_s(output))


def delta(request: GenerationRequest, output: Any, *, first: bool) -> Delta:
    """Reads one output of a stream; raises EngineDead where vLLM gave the request up."""
    completion = output.outputs[0]
    reason = _finish_reason(request, completion.finish_reason)
    token_ids = tuple(completion.token_ids)
    if reason is FinishReason.STOP:
        token_ids = token_ids[:-1]  # vLLM hands out the stop token
    logprobs: tuple[TokenLogprob, ...] = ()
    if request.logprobs is not None:
        found = completion.logprobs[: len(token_ids)]
        logprobs = tuple(_entry(*pair, request.logprobs) for pair in zip(token_ids, found, strict=True))
    prompt_logprobs = None
    if first and request.prompt_logprobs is not None:
        prompt_logprobs = _prompt_entries(request.prompt_ids, output.prompt_logprobs, request.prompt_logprobs)
    return Delta(token_ids, logprobs, prompt_logprobs, reason, _waited_s(output) if first else None)


class StepMeter:
    """A vLLM stat logger, by its methods: counts the steps of the engine's process."""

    def __init__(self) -> None:
        self.steps = 0
        self.waiting = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, **others: Any) -> None:
        if scheduler_stats is not None:
            self.steps += 1
            self.waiting = int(scheduler_stats.num_waiting_reqs)

    def log(self) -> None: ...

    def log_engine_initialized(self) -> None: ...


def _waited_s(output: Any) -> float:
    """How long the request lay in vLLM's own queue, as for room in the cache; its process's clock."""
    return float(output.metrics.scheduled_ts - output.metrics.queued_ts)


def _finish_reason(request: GenerationRequest, reason: str | None) -> FinishReason | None:
    if reason in {None, "stop", "length"}:
        return None if reason is None else FinishReason(reason)
    raise EngineDead(f"vLLM ended request {request.request_id} with {reason!r}; send it again")


def _prompt_entries(
    prompt_ids: tuple[int, ...], found: list[Any] | None, count: int
) -> tuple[TokenLogprob | None, ...]:
    rest = (found or [None])[1:]
    return (None, *(_entry(*pair, count) for pair in zip(prompt_ids[1:], rest, strict=True)))


def _entry(token_id: int, found: Mapping[int, Any], count: int) -> TokenLogprob:
    """`found` has the `count` likeliest tokens by rank and, where it is none of them, the token itself."""
    best = sorted((entry.rank, other) for other, entry in found.items() if entry.rank <= count)
    top = tuple((other, _finite(found[other].logprob)) for _, other in best[:count])
    return TokenLogprob(token_id, _finite(found[token_id].logprob), top)


def _finite(logprob: float) -> float:
    return UNLIKELY_NATS if math.isinf(logprob) else logprob
