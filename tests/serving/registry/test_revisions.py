"""What is known of retired revisions is bounded, and what a label can come back to stays known."""

from __future__ import annotations

from serving.registry.revision import Revision, RevisionStatus
from serving.registry.revisions import RETIRED_KEPT, Revisions
from serving.registry.state import State


def revision(number: int) -> Revision:
    return Revision("a", f"{number:064x}", RevisionStatus.ADMITTED, float(number), 8, "c" * 64)


def test_of_the_retired_the_newest_and_the_needed_stay_known(tmp_path):
    state, revisions = State(tmp_path), Revisions()
    made = [revision(number) for number in range(RETIRED_KEPT + 3)]
    live = revision(-1 % 2**200)
    with state.transaction() as change:
        for each in (live, *made):
            revisions.put(change, each, None)
    needed = {made[1].key}
    for each in reversed(made):
        with state.transaction() as change:
            assert revisions.retire(change, each, needed).status is RevisionStatus.RETIRED
    for known in (list(revisions), state.revisions()):
        assert {each.key for each in known} == {live.key, *needed, *(each.key for each in made[3:])}
    state.close()
