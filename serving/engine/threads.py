"""The threads that a step computes with on a CPU: for few tokens one can be faster than all, which is measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from serving.engine.attention import Span, make_plan
from serving.engine.kv_cache import KvCache
from serving.engine.weights import Forward, WeightSet

FEW_TOKENS = (1, 8)  # of the steps that are measured
_CONTEXT, _REPEATS = 16, 4


@dataclass(frozen=True, slots=True)
class StepThreads:
    """One thread computes a step of at most `alone_up_to` tokens, `most` a larger one."""

    alone_up_to: int
    most: int

    def take(self, tokens: int) -> None:
        """Sets what the calling thread computes with."""
        wanted = 1 if tokens <= self.alone_up_to else self.most
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)


@torch.inference_mode()
def measure_threads(weights: WeightSet) -> StepThreads:
    """Times steps of few decoding rows with one thread and with all, in turn; takes a second or two.

    Where cores share their memory's bandwidth, a second thread only adds waiting. Where the two give other bits, all
    threads compute every step: a reply must not depend on its company.
    """
    most = torch.get_num_threads()
    if weights.device.type != "cpu" or most == 1:
        return StepThreads(0, most)
    alone_up_to = 0
    try:
        for tokens in FEW_TOKENS:
            alone, all_of_them = _compare(weights, tokens, most)
            if not torch.equal(alone.logits, all_of_them.logits):
                return StepThreads(0, most)
            if alone.seconds < all_of_them.seconds:
                alone_up_to = tokens
    finally:
        torch.set_num_threads(most)
    return StepThreads(alone_up_to, most)


@dataclass(frozen=True, slots=True)
class _Timed:
    seconds: float  # of the fastest
    logits: torch.Tensor


def _compare(weights: WeightSet, tokens: int, most: int) -> tuple[_Timed, _Timed]:
    size = tokens * (_CONTEXT + 1) * weights.shape.token_bytes(weights.dtype)
    cache = KvCache(weights.shape, weights.dtype, weights.device, tokens, _CONTEXT + 1, size)
    cache.reserve(tokens, _CONTEXT + 1)
    plan = make_plan(cache, [Span(row, _CONTEXT, row, 1) for row in range(tokens)])
    batch = Forward(torch.arange(tokens) % weights.vocabulary, plan.positions_T, plan, ())
    found: dict[int, list[_Timed]] = {1: [], most: []}
    for _ in range(_REPEATS):
        for threads, timed in found.items():
            torch.set_num_threads(threads)
            begun = time.perf_counter()
            logits = weights.logits(weights.forward(batch))
            timed.append(_Timed(time.perf_counter() - begun, logits))
    alone, all_of_them = (min(timed, key=lambda each: each.seconds) for timed in found.values())
    return alone, all_of_them
