"""The scheduler: which rows run in the next step and with how many tokens; every row keeps its place in the queue."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from serving.engine.engine import GenerationRequest, TokenLogprob

if TYPE_CHECKING:
    import torch

    from serving.engine.grammar import Matcher

ADMISSION_HEADROOM = 64  # tokens a new row must be able to grow by, so that it is not preempted at once


@dataclass(slots=True, eq=False)
class Row:
    """One request inside the engine: all its tokens, and how many of them the cache holds.

    A row with one token that is not cached decodes; with more it still reads its prompt. A preempted row reads its
    prompt and what it generated once more.
    """

    request: GenerationRequest
    generator: torch.Generator
    matcher: Matcher | None = None
    ids: list[int] = field(init=False)
    cached: int = 0
    order: int = -1  # of admission
    came_s: float = field(default_factory=time.perf_counter)
    waited_s: float | None = None  # for its first admission
    counts: Counter[int] = field(default_factory=Counter)  # of generated tokens
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        return len(self.ids) - self.cached

    @property
    def generated(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)


@dataclass(frozen=True, slots=True)
class Work:
    """The next `count` tokens of a row, which sits in `slot`."""

    row: Row
    slot: int
    count: int

    @property
    def completes(self) -> bool:
        """Whether the row's next token is known after this."""
        return self.count == self.row.pending


class Slots(Protocol):
    """What is needed of a KvCache."""

    max_length: int

    def reserve(self, rows: int, length: int) -> bool: ...

    def move(self, source: int, target: int, length: int) -> None: ...


class Scheduler:
    """First in, first out: at most `max_rows` rows run, others wait; `chunk_tokens` bounds a step's prompt tokens."""

    def __init__(self, cache: Slots, *, max_rows: int, chunk_tokens: int) -> None:
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []  # by slot: no holes, so that a range of slots is a view of the cache
        self._cache, self._max_rows, self._chunk_tokens = cache, max_rows, chunk_tokens
        self._admitted = 0

    @property
    def rows(self) -> Iterator[Row]:
        yield from self.active
        yield from self.waiting

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def drop(self, row: Row) -> None:
        """Forgets a row, finished or aborted; one that is unknown already was forgotten."""
        if row in self.active:
            self._release(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def plan(self) -> list[Work]:
        """Returns the next step: every decoding row, then prompts in order of arrival as far as the budget goes."""
        while not self._cache.reserve(len(self.active), self._longest()):
            self._preempt()
        self._admit()
        work, budget = [], self._chunk_tokens
        for slot, row in sorted(enumerate(self.active), key=lambda item: item[1].order):
            count = 1 if row.pending == 1 else min(row.pending, budget)
            budget -= count if row.pending > 1 else 0
            if count:
                work.append(Work(row, slot, count))
        return work

    def _admit(self) -> None:
        """Starts waiting rows while there is a slot, cache for them, and a prompt budget that would reach them."""
        unread = sum(row.pending for row in self.active if row.pending > 1)
        while self.waiting and len(self.active) < self._max_rows and unread < self._chunk_tokens:
            row = self.waiting[0]
            length = min(len(row.ids) + ADMISSION_HEADROOM, self._cache.max_length)
            if not self._cache.reserve(len(self.active) + 1, max(self._longest(), length)):
                return
            self.waiting.popleft()
            row.order, self._admitted = self._admitted, self._admitted + 1
            if row.waited_s is None:
                row.waited_s = time.perf_counter() - row.came_s
            self.active.append(row)
            unread += row.pending

    def _longest(self) -> int:
        return max((len(row.ids) for row in self.active), default=0)

    def _preempt(self) -> None:
        """Sends the row that came last back to the head of the queue; its cache is computed again later."""
        row = max(self.active, key=lambda active: active.order)
        self._release(row)
        row.cached = 0
        self.waiting.appendleft(row)

    def _release(self, row: Row) -> None:
        slot, last = self.active.index(row), self.active.pop()
        if last is not row:
            self._cache.move(len(self.active), slot, last.cached)
            self.active[slot] = last
