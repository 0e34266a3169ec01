"""A label walks back as far as the state keeps its moves, before a restart as after it."""

from __future__ import annotations

import pytest

from serving.errors import Conflict
from serving.registry.change import MOVES_KEPT
from serving.registry.labels import Labels
from serving.registry.state import State


def test_moves_over_the_bound_are_forgotten_in_memory_as_on_the_disk(tmp_path):
    state = State(tmp_path)
    labels = Labels(state)
    digests = [str(number) for number in range(MOVES_KEPT + 2)]
    for digest in digests:
        with state.transaction() as change:
            labels.move(change, "a", "stable", digest, None)
    assert labels.history() == {("a", digest) for digest in digests[2:]}
    for known in (labels, Labels(state)):
        assert (known.history(), list(known)) == (labels.history(), list(labels))
    for digest in reversed(digests[2:-1]):
        with state.transaction() as change:
            assert labels.roll_back(change, "a", "stable", digests).digest == digest
    with pytest.raises(Conflict, match="has pointed at nothing else"), state.transaction() as change:
        labels.roll_back(change, "a", "stable", digests)
    assert [each.digest for each in state.moves()] == ["2"]
    state.close()


def test_what_is_not_kept_moves_no_label(tmp_path):
    state = State(tmp_path)
    labels = Labels(state)

    def fail():
        with state.transaction() as change:
            labels.move(change, "a", "canary", "1", None)
            labels.move(change, "a", "stable", "1", "2")

    with pytest.raises(Conflict, match="points at nothing"):
        fail()
    assert (list(labels), state.moves()) == ([], [])
    state.close()
