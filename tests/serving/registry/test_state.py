"""What was committed is there after any death, and what was not leaves no trace."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from serving.registry.revision import Label, ProbeResult, Reference, Refusal, Revision, RevisionStatus
from serving.registry.routing import Policy
from serving.registry.state import MOVES_KEPT, REFUSALS_KEPT, State, StateError

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
    with state.transaction():
        state.move_label(Label("starter", "stable", digest, moved))


def test_everything_is_there_after_a_reopening(state):
    policy = Policy({"stable": 90, "canary": 10}, sticky=True, shadow="next")
    with state.transaction():
        state.put_revision(ONE)
        state.put_revision(TWO)
        state.move_label(Label("starter", "stable", ONE.digest, 3.0))
        state.move_label(Label("starter", "stable", TWO.digest, 4.0))
        state.set_policy("starter", policy)
        state.set_flag("starter", ONE.digest)
        state.put_refusal(Refusal("bad", "runs/bad", ("why", "and why"), 5.0))
        state.set_fact("base_fingerprint", "f")
    again = reopened(state)
    assert again.revisions() == [ONE, TWO]
    assert again.labels() == [Label("starter", "stable", TWO.digest, 4.0, ONE.digest)]
    assert again.policies() == {"starter": policy}
    assert again.flags() == {"starter": ONE.digest}
    assert again.refusals() == [Refusal("bad", "runs/bad", ("why", "and why"), 5.0)]
    assert (again.fact("base_fingerprint"), again.fact("nothing")) == ("f", None)


def test_a_transaction_that_fails_changes_nothing_and_tells_nobody(state):
    told = []

    def fail():
        with state.transaction() as then:
            then(lambda: told.append("outer"))
            state.put_revision(ONE)
            with state.transaction() as inner:
                inner(lambda: told.append("inner"))
                state.put_revision(TWO)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (state.revisions(), told) == ([], [])
    with state.transaction() as then:
        state.put_revision(ONE)
        then(lambda: told.append(len(state.revisions())))
        assert told == []
    assert told == [1]


def test_undoing_moves_walks_back(state):
    for digest in "abc":
        move(state, digest)
    with state.transaction():
        assert state.undo_move("starter", "stable").digest == "b"
        assert state.undo_move("starter", "stable").previous is None
        state.drop_label("starter", "stable")
    assert state.labels() == []


def test_what_only_grows_is_bounded(state):
    for number in range(MOVES_KEPT + 5):
        move(state, str(number))
    with state.transaction():
        for number in range(REFUSALS_KEPT + 5):
            state.put_refusal(Refusal("bad", str(number), (), float(number)))
    assert len(state.refusals()) == REFUSALS_KEPT
    assert state.refusals()[0].source == str(REFUSALS_KEPT + 4)
    with state.transaction():
        for _ in range(MOVES_KEPT - 1):
            last = state.undo_move("starter", "stable")
    assert (last.digest, last.previous) == ("5", None)


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
with state.transaction():
    state.put_revision(new)
    state.move_label(Label("starter", "stable", new.digest, 2.0))
    state.set_flag("starter", new.digest)
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
    with state.transaction():
        state.put_revision(ONE)
        state.move_label(Label("starter", "stable", ONE.digest, 1.0))
        state.set_flag("starter", ONE.digest)
    state.close()
    died = subprocess.run([sys.executable, "-c", KILLED, point, str(tmp_path)], check=False)
    assert died.returncode == -signal.SIGKILL
    state = State(tmp_path)  # the lock died with the process
    new = replace(ONE, digest="b" * 64, created=2.0, manifest_sha256="d" * 64)
    assert state.revisions() == ([ONE, new] if kept else [ONE])
    label = Label("starter", "stable", ONE.digest, 1.0)
    assert state.labels() == [Label("starter", "stable", new.digest, 2.0, ONE.digest) if kept else label]
    assert state.flags() == {"starter": new.digest if kept else ONE.digest}
    assert state._connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    state.close()
