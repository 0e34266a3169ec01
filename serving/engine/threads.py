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
_LONG_S = 0.5  # a step


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
    """Times steps of few decoding rows with all threads and with one, in turn; takes a second or two.

    Where cores share their memory's bandwidth, a second thread only adds waiting. Where the two give other bits, all
    threads compute every step: a reply must not depend on its company.
    """
    most, alone_up_to = torch.get_num_threads(), 0
    if weights.device.type != "cpu" or most == 1:
        return StepThreads(0, most)
    try:
        for tokens in FEW_TOKENS:
            batch = _decoding(weights, tokens)
            all_s, logits = _timed(weights, batch, most)
            if all_s > _LONG_S:  # so large a model has work for all
                break
            alone_s, same = _timed(weights, batch, 1)
            if not torch.equal(logits, same):
                return StepThreads(0, most)
            for _ in range(_REPEATS):
                all_s = min(all_s, _timed(weights, batch, most)[0])
                if alone_s > 2 * all_s:  # no noise
                    break
                alone_s = min(alone_s, _timed(weights, batch, 1)[0])
            if alone_s >= all_s:
                break
            alone_up_to = tokens
    finally:
        torch.set_num_threads(most)
    return StepThreads(alone_up_to, most)


def _decoding(weights: WeightSet, tokens: int) -> Forward:
    """Returns the step of so many rows, each with a few cached tokens."""
    size = tokens * (_CONTEXT + 1) * weights.shape.token_bytes(weights.dtype)
    cache = KvCache(weights.shape, weights.dtype, weights.device, tokens, _CONTEXT + 1, size)
    cache.reserve(tokens, _CONTEXT + 1)
    plan = make_plan(cache, [Span(row, _CONTEXT, row, 1) for row in range(tokens)])
    return Forward(torch.arange(tokens) % weights.vocabulary, plan.positions_T, plan, ())


def _timed(weights: WeightSet, batch: Forward, threads: int) -> tuple[float, torch.Tensor]:
    """Returns the step's seconds and logits."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    logits = weights.logits(weights.forward(batch))
    return time.perf_counter() - begun, logits
