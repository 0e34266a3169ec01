"""The scheduler is fair, leaves no holes, and gives way when the cache is full."""

from __future__ import annotations

from pathlib import Path

import torch

from serving.engine.engine import GenerationRequest, Sampling, Variant, VariantKind
from serving.engine.scheduler import ADMISSION_HEADROOM, Row, Scheduler

BASE = Variant("base", VariantKind.BASE, "b", Path("base"))


class Room:
    """Slots that hold `tokens` in all, and remember what was moved."""

    def __init__(self, tokens: int = 10**6, max_length: int = 1000) -> None:
        self.tokens, self.max_length = tokens, max_length
        self.moves: list[tuple[int, int, int]] = []

    def reserve(self, rows: int, length: int) -> bool:
        return rows * length <= self.tokens

    def move(self, source: int, target: int, length: int) -> None:
        self.moves.append((source, target, length))


def make_row(prompt_tokens: int) -> Row:
    request = GenerationRequest("r", BASE, tuple(range(prompt_tokens)), Sampling(max_tokens=100))
    return Row(request, torch.Generator())


def run_step(scheduler: Scheduler) -> list[tuple[Row, int]]:
    """Does what a step does to the rows; returns (row, tokens)."""
    work = scheduler.plan()
    for item in work:
        assert scheduler.active[item.slot] is item.row
        completes = item.completes
        item.row.cached += item.count
        if completes:
            item.row.ids.append(0)
    return [(item.row, item.count) for item in work]


def test_prompts_are_read_in_order_of_arrival_within_the_budget():
    scheduler = Scheduler(Room(), max_rows=8, chunk_tokens=10)
    first, second, third = rows = [make_row(length) for length in (15, 8, 4)]
    for row in rows:
        scheduler.add(row)
    assert run_step(scheduler) == [(first, 10)]
    assert run_step(scheduler) == [(first, 5), (second, 5)]
    assert run_step(scheduler) == [(first, 1), (second, 3), (third, 4)]
    assert run_step(scheduler) == [(first, 1), (second, 1), (third, 1)]


def test_decoding_rows_run_in_every_step_whatever_the_prompts():
    scheduler = Scheduler(Room(), max_rows=8, chunk_tokens=4)
    decoding = make_row(1)
    scheduler.add(decoding)
    run_step(scheduler)
    scheduler.add(make_row(50))
    for _ in range(12):
        assert (decoding, 1) in run_step(scheduler)


def test_rows_over_the_limit_wait_for_a_slot_in_order():
    scheduler = Scheduler(Room(), max_rows=2, chunk_tokens=100)
    rows = [make_row(3) for _ in range(4)]
    for row in rows:
        scheduler.add(row)
    run_step(scheduler)
    assert scheduler.active == rows[:2]
    scheduler.drop(rows[0])
    run_step(scheduler)
    assert set(scheduler.active) == {rows[1], rows[2]}
    assert list(scheduler.waiting) == [rows[3]]


def test_the_last_row_fills_the_hole_that_a_row_leaves():
    room = Room()
    scheduler = Scheduler(room, max_rows=4, chunk_tokens=100)
    rows = [make_row(3) for _ in range(4)]
    for row in rows:
        scheduler.add(row)
    run_step(scheduler)
    scheduler.drop(rows[1])
    assert scheduler.active == [rows[0], rows[3], rows[2]]
    assert room.moves == [(3, 1, 3)]
    scheduler.drop(rows[2])
    assert scheduler.active == [rows[0], rows[3]]
    assert len(room.moves) == 1, "the last row leaves no hole"


def test_dropping_a_waiting_or_unknown_row_is_safe():
    scheduler = Scheduler(Room(), max_rows=1, chunk_tokens=100)
    running, waiting = make_row(3), make_row(3)
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler)
    scheduler.drop(waiting)
    scheduler.drop(waiting)
    assert list(scheduler.rows) == [running]


def test_a_full_cache_sends_the_row_that_came_last_back_to_the_head_of_the_queue():
    scheduler = Scheduler(Room(tokens=400), max_rows=4, chunk_tokens=100)
    old, young, unstarted = rows = [make_row(100) for _ in range(3)]
    for row in rows:
        scheduler.add(row)
    while not (old.generated and young.generated):
        run_step(scheduler)
    assert list(scheduler.waiting) == [unstarted], f"a third row of {100 + ADMISSION_HEADROOM} tokens has no room"
    while young in scheduler.active:
        run_step(scheduler)
    assert len(old.ids) > 200
    assert list(scheduler.waiting) == [young, unstarted]
    assert young.cached == 0
    assert young.generated, "what it generated stays"
    scheduler.drop(old)
    assert run_step(scheduler) == [(young, 100)]


def test_a_row_that_fills_the_cache_alone_goes_on():
    scheduler = Scheduler(Room(tokens=150, max_length=150), max_rows=4, chunk_tokens=100)
    row = make_row(100)
    scheduler.add(row)
    while len(row.ids) < 150:
        assert run_step(scheduler)
