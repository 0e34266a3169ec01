"""Rows are never more than there are, no lane waits for another's queue, and whoever leaves makes room at once."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import Overloaded
from serving.fair_queue import FairQueue


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Waiting:
    """Enters a queue, one place at a time; `granted` names those that have a row, in the order of their grants."""

    def __init__(self, rows, room):
        self.clock = Clock()
        self.queue = FairQueue(rows, room, self.clock)
        self.stack = ExitStack()
        self.places = []

    def enter(self, revision, caller="ann", count=1):
        places = self.stack.enter_context(self.queue.places(revision, caller, count))
        self.places += [(f"{revision}/{caller}", place) for place in places]

    def running(self):
        return [(name, place) for name, place in self.places if place.granted_s is not None]

    def serve(self):
        """Ends what runs, one after another, until nothing waits; returns the order in which rows were granted."""
        order = [name for name, _ in self.running()]
        while running := self.running():
            self.places.remove(running[0])
            before = [place for _, place in self.running()]
            running[0][1].leave()
            order += [name for name, place in self.running() if place not in before]
        return order


def test_a_rare_model_is_not_starved_by_a_busy_one():
    waiting = Waiting(4, 300)
    for _ in range(200):
        waiting.enter("busy@1")
    waiting.enter("rare@2")
    assert waiting.serve().index("rare@2/ann") == 5, "four rows run, then one for each model"


def test_callers_take_turns_within_a_model_and_models_come_first():
    waiting = Waiting(1, 100)
    for name in ("a", "a", "a", "a", "b"):
        waiting.enter("x", name)
    waiting.enter("y", "c", count=2)
    assert waiting.serve() == ["x/a", "x/a", "y/c", "x/b", "y/c", "x/a", "x/a"]


def test_one_lane_is_first_in_first_out():
    waiting = Waiting(1, 10)
    waiting.enter("x", count=3)
    places = [place for _, place in waiting.places]
    for number, place in enumerate(places):
        assert [other.granted_s is not None for other in places] == [at <= number for at in range(3)]
        place.leave()


def test_the_queue_is_bounded_in_all_and_counts_a_burst_at_once():
    waiting = Waiting(2, 3)
    assert waiting.queue.capacity == 5
    waiting.enter("x", count=2)
    waiting.enter("y", count=2)
    with pytest.raises(Overloaded, match="2 completions wait and the queue holds 3"):
        waiting.enter("z", count=2)
    waiting.enter("z", count=1)
    assert waiting.queue.waiting() == {"y": 2, "z": 1}
    with pytest.raises(Overloaded):
        waiting.enter("z")
    waiting.stack.close()
    assert (waiting.queue.running(), waiting.queue.waiting()) == (0, {})
    waiting.enter("x", count=5)


def test_leaving_the_queue_makes_room_and_hands_no_row_on():
    waiting = Waiting(1, 2)
    waiting.enter("x")
    with waiting.queue.places("y", "bob", 2):
        assert waiting.queue.waiting() == {"y": 2}
    assert waiting.queue.waiting() == {}
    assert waiting.queue.running() == 1
    waiting.enter("y", count=2)


def test_retry_after_is_when_the_queue_will_have_been_served():
    waiting = Waiting(2, 20)
    waiting.enter("x", count=22)

    def retry_s():
        with pytest.raises(Overloaded) as caught:
            waiting.enter("x")
        return caught.value.retry_after_s

    assert retry_s() == 2, "nothing is measured yet"
    for _ in range(10):
        waiting.clock.now_s += 4
        waiting.places.pop(0)[1].leave()
        waiting.enter("x")
    assert 20 * 6 / 2 < retry_s() < 20 * 8 / 2, "a row is held for 8 s, the first one for 4"
    waiting.clock.now_s += 10_000
    waiting.places.pop(0)[1].leave()
    waiting.enter("x")
    assert retry_s() == 120
    fast = Waiting(4, 1)
    fast.enter("x", count=5)
    fast.places.pop(0)[1].leave()
    fast.enter("x")
    waiting = fast
    assert retry_s() == 1


def test_a_turn_comes_in_the_same_round_of_the_loop_and_says_what_it_took():
    async def run():
        clock = Clock()
        queue = FairQueue(1, 5, clock)
        with queue.places("x", "ann", 1) as (first,), queue.places("x", "ann", 1) as (second,):
            assert await first.turn() == 0
            turn = asyncio.create_task(second.turn())
            await asyncio.sleep(0)
            assert not turn.done()
            clock.now_s += 3
            first.leave()
            assert second.granted_s == 3, "before anything else can run"
            assert await turn == 3
        assert queue.running() == 0

    asyncio.run(run())


def test_a_waiter_that_is_cancelled_as_its_row_comes_hands_it_on():
    async def run():
        queue = FairQueue(1, 5)
        with queue.places("x", "ann", 1) as (first,), queue.places("x", "ann", 1) as (third,):
            with queue.places("x", "bob", 1) as (second,):
                turn = asyncio.create_task(second.turn())
                await asyncio.sleep(0)
                turn.cancel()
                first.leave()  # third's row, or second's: both had waited
                await asyncio.gather(turn, return_exceptions=True)
            await asyncio.wait_for(third.turn(), 5)
            assert queue.running() == 1

    asyncio.run(run())


@given(st.integers(1, 4), st.integers(0, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=60))
def test_rows_and_room_hold_and_nothing_waits_while_a_row_is_free(rows, room, steps):
    queue, entered = FairQueue(rows, room), []
    for action, count in steps:
        if action >= 4 and entered:
            entered.pop(count % len(entered)).close()
        else:
            stack = ExitStack()
            try:
                stack.enter_context(queue.places(f"m{action}", f"c{count}", count))
                entered.append(stack)
            except Overloaded:
                pass
        waiting = sum(queue.waiting().values())
        assert 0 <= queue.running() <= rows
        assert 0 <= waiting <= room
        assert not waiting or queue.running() == rows
        assert 0 not in queue.waiting().values()
    for stack in entered:
        stack.close()
    assert (queue.running(), queue.waiting()) == (0, {})
