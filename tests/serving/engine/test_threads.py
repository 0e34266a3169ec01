"""A step takes as many threads as were measured to be fastest for its tokens, and never changes a reply by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engine.kv_cache import CacheShape
from serving.engine.threads import FEW_TOKENS, StepThreads, measure_threads
from serving.engine.weights import Forward, load_weights


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Weights:
    """As much of a WeightSet as is measured; `cost_s` is what a step takes by threads and tokens."""

    device, dtype, shape, vocabulary = torch.device("cpu"), torch.float32, CacheShape(1, 1, 8), 50

    def __init__(self, cost_s: Callable[[int, int], float], bits: Callable[[int], float] = lambda _: 0.0) -> None:
        self._cost_s, self._bits = cost_s, bits

    def forward(self, batch: Forward) -> torch.Tensor:
        time.sleep(self._cost_s(torch.get_num_threads(), len(batch.ids_T)))
        return torch.zeros(len(batch.ids_T), 4)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self._bits(torch.get_num_threads())


def measured(*arguments: Any) -> StepThreads:
    weights: Any = Weights(*arguments)
    return measure_threads(weights)


@pytest.mark.parametrize(
    ("cost_s", "alone_up_to"),
    [
        (lambda threads, _: 0.001 if threads == 1 else 0.02, FEW_TOKENS[-1]),
        (lambda threads, _: 0.02 if threads == 1 else 0.001, 0),
        (lambda threads, tokens: 0.001 if (threads == 1) == (tokens == 1) else 0.02, FEW_TOKENS[0]),
        (lambda threads, _: 0.55 if threads == 2 else 0.001, 0),  # a step so long is of a model that is large
    ],
)
def test_what_is_faster_is_taken(cost_s, alone_up_to):
    assert measured(cost_s) == StepThreads(alone_up_to, 2)
    assert torch.get_num_threads() == 2


def test_other_bits_are_never_taken_for_speed():
    assert measured(lambda threads, _: 0.01 * threads, lambda threads: 1e-7 * threads) == StepThreads(0, 2)


def test_a_step_takes_one_thread_or_all():
    threads = StepThreads(8, 2)
    threads.take(8)
    assert torch.get_num_threads() == 1
    threads.take(9)
    assert torch.get_num_threads() == 2


def test_one_thread_is_not_measured():
    torch.set_num_threads(1)
    assert measured(lambda *_: pytest.fail("measured")) == StepThreads(0, 1)


def test_a_real_base_is_measured(tiny_base: Path):
    found = measure_threads(load_weights(tiny_base, 64, torch.device("cpu")))
    assert found.most == 2
    assert found.alone_up_to in (0, *FEW_TOKENS)
