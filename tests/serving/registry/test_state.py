"""What was committed is there after any death, and what was not leaves no trace."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from serving.registry.change import MOVES_KEPT, REFUSALS_KEPT
from serving.registry.revision import Label, ProbeResult, Reference, Refusal, Revision, RevisionStatus
from serving.registry.routing import Policy
from serving.registry.state import State, StateError

ONE = Revision("starter", "a" * 64, RevisionStatus.ADMITTED, 1.5, 8, "c" * 64)
TWO = Revision(
    "starter",
    "b" * 64,
    RevisionStatus.BROKEN,
    2.5,
    16,
    "d" * 64,
    pinned=True,
    reasons=("one", "two"),
    load_s=0.25,
    probe=ProbeResult(Reference.MATCHED, 241, 1.4, 1e-6, 1e-3),
)


@pytest.fixture
def state(tmp_path):
    state = State(tmp_path)
    yield state
    state.close()


def reopened(state):
    state.close()
    state.__init__(state.directory)
    return state


def move(state, digest, moved=1.0):
    with state.transaction() as change:
        change.move_label(Label("starter", "stable", digest, moved))


def test_everything_is_there_after_a_reopening(state):
    policy = Policy({"stable": 90, "canary": 10}, sticky=True, shadow="next")
    first = Label("starter", "stable", ONE.digest, 3.0)
    with state.transaction() as change:
        change.put_revision(ONE)
        change.put_revision(TWO)
        change.put_revision(replace(ONE, name="gone"))
        change.forget_revision(replace(ONE, name="gone"))
        change.move_label(first)
        change.move_label(Label("starter", "stable", TWO.digest, 4.0))
        change.move_label(Label("other", "stable", TWO.digest, 4.5))
        change.set_policy("starter", policy)
        change.set_flag("starter", ONE.digest)
        change.put_refusal(Refusal("bad", "runs/bad", ("why", "and why"), 5.0))
        change.set_fact("base_fingerprint", "f")
    again = reopened(state)
    assert again.revisions() == [ONE, TWO]
    assert again.moves() == [
        first,
        Label("starter", "stable", TWO.digest, 4.0, ONE.digest),
        Label("other", "stable", TWO.digest, 4.5),
    ]
    assert again.policies() == {"starter": policy}
    assert again.flags() == {"starter": ONE.digest}
    assert again.refusals() == [Refusal("bad", "runs/bad", ("why", "and why"), 5.0)]
    assert (again.fact("base_fingerprint"), again.fact("nothing")) == ("f", None)


def test_a_transaction_that_fails_changes_nothing_and_tells_nobody(state):
    told = []

    def fail():
        with state.transaction() as change:
            change.then(lambda: told.append("failed"))
            change.put_revision(ONE)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (state.revisions(), told) == ([], [])
    with state.transaction() as change:
        change.put_revision(ONE)
        change.then(lambda: told.append(len(state.revisions())))
        assert told == []
    assert told == [1]


def test_a_write_that_fails_takes_those_before_it_along(state):
    def fail():
        with state.transaction() as change:
            change.put_revision(ONE)
            change.put_revision(replace(TWO, rank=None))

    with pytest.raises(sqlite3.IntegrityError):
        fail()
    assert state.revisions() == []


def test_changes_come_one_after_another_and_each_sees_what_the_one_before_kept(state):
    kept = []

    async def add(number):
        async with state.change() as change:
            seen = len(kept)
            await asyncio.sleep(0.001)
            change.put_revision(replace(ONE, name=f"n{number}"))
            change.then(lambda: kept.append(number))
        assert seen == number, "nobody else changed anything meanwhile"
        assert kept[number] == number

    async def check():
        await asyncio.gather(*map(add, range(5)))
        assert len(await state.read(state.revisions)) == 5

    asyncio.run(check())


def test_the_loop_goes_on_while_a_change_is_written(state):
    async def check():
        written, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def wait(statement):
            if statement == "COMMIT":
                loop.call_soon_threadsafe(written.set)
                assert go_on.wait(30)

        state._connection.set_trace_callback(wait)
        changing = asyncio.create_task(put_one(state))
        await asyncio.wait_for(written.wait(), 30)  # were the commit on the loop, nothing would come here
        assert not changing.done()
        go_on.set()
        await changing

    asyncio.run(check())
    assert reopened(state).revisions() == [ONE]


async def put_one(state, told=None):
    async with state.change() as change:
        change.put_revision(ONE)
        if told is not None:
            change.then(lambda: told.append(ONE))


def test_a_change_that_is_cancelled_while_it_is_written_is_kept_and_told_before_the_next(state):
    told = []

    async def check():
        changing = asyncio.create_task(put_one(state, told))
        await asyncio.sleep(0)  # it has its turn, and now writes
        changing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await changing
        async with state.change():
            assert told == [ONE]

    asyncio.run(check())
    assert state.revisions() == [ONE]


@pytest.mark.parametrize("broken", [replace(ONE, rank=None), None])
def test_a_change_that_fails_leaves_the_next_its_turn(state, broken):
    """It fails in the file, or before it."""

    async def fail():
        async with state.change() as change:
            change.put_revision(ONE)
            change.put_revision(broken)

    async def check():
        with pytest.raises((sqlite3.IntegrityError, TypeError)):
            await fail()
        assert state.revisions() == []
        await put_one(state)

    asyncio.run(check())
    assert state.revisions() == [ONE]


def test_undoing_moves_walks_back(state):
    for digest in "abc":
        move(state, digest)
    for left in ("ab", "a"):
        with state.transaction() as change:
            change.undo_move("starter", "stable")
        assert "".join(each.digest for each in state.moves()) == left
    with state.transaction() as change:
        change.drop_label("starter", "stable")
    assert state.moves() == []


def test_what_only_grows_is_bounded(state):
    for number in range(MOVES_KEPT + 5):
        move(state, str(number))
    with state.transaction() as change:
        for number in range(REFUSALS_KEPT + 5):
            change.put_refusal(Refusal("bad", str(number), (), float(number)))
    assert len(state.refusals()) == REFUSALS_KEPT
    assert state.refusals()[0].source == str(REFUSALS_KEPT + 4)
    assert len(state.moves()) == MOVES_KEPT
    assert (state.moves()[0].digest, state.moves()[0].previous) == ("5", None)


def test_a_second_server_is_told_so(tmp_path, state):
    with pytest.raises(StateError, match="another server uses it"):
        State(tmp_path)
    state.close()
    State(tmp_path).close()
    state.__init__(tmp_path)


def test_a_file_that_is_no_registry_of_this_version_is_refused_and_the_lock_is_free(tmp_path):
    path = tmp_path / "registry.sqlite"
    path.write_bytes(b"no database, but long enough to be looked at" * 30)
    for _ in range(2):
        with pytest.raises(StateError, match="is no registry"):
            State(tmp_path)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StateError, match="schema 99"):
        State(tmp_path)


KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
from serving.registry.revision import Label, Revision, RevisionStatus
from serving.registry.state import State

point, directory = sys.argv[1], Path(sys.argv[2])
state = State(directory)
new = Revision("starter", "b" * 64, RevisionStatus.ADMITTED, 2.0, 8, "d" * 64)

def die(statement):
    if statement.startswith(point):
        os.kill(os.getpid(), signal.SIGKILL)

state._connection.set_trace_callback(die)
with state.transaction() as change:
    change.put_revision(new)
    change.move_label(Label("starter", "stable", new.digest, 2.0))
    change.set_flag("starter", new.digest)
if point == "after":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("point", "kept"),
    [("BEGIN", False), ("INSERT OR REPLACE INTO revisions", False), ("INSERT OR REPLACE INTO moves", False),
     ("DELETE FROM moves", False), ("INSERT OR REPLACE INTO flags", False), ("COMMIT", False), ("after", True)],
)  # fmt: skip
def test_a_process_killed_inside_a_change_leaves_all_of_it_or_nothing(tmp_path, point, kept):
    state = State(tmp_path)
    with state.transaction() as change:
        change.put_revision(ONE)
        change.move_label(Label("starter", "stable", ONE.digest, 1.0))
        change.set_flag("starter", ONE.digest)
    state.close()
    died = subprocess.run([sys.executable, "-c", KILLED, point, str(tmp_path)], check=False)
    assert died.returncode == -signal.SIGKILL
    state = State(tmp_path)  # the lock died with the process
    new = replace(ONE, digest="b" * 64, created=2.0, manifest_sha256="d" * 64)
    assert state.revisions() == ([ONE, new] if kept else [ONE])
    moves = [Label("starter", "stable", ONE.digest, 1.0), Label("starter", "stable", new.digest, 2.0, ONE.digest)]
    assert state.moves() == (moves if kept else moves[:1])
    assert state.flags() == {"starter": new.digest if kept else ONE.digest}
    assert state._connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    state.close()
