"""Packing: every row once, in order, with its own positions; no label crosses a row's end."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.batch import epoch_order, pack_rows, rank_share, step_rows, targets
from training.chat import IGNORED_LABEL, TrainExample


def example(length: int, first: int = 0) -> TrainExample:
    ids = tuple(range(first, first + length))
    return TrainExample(ids, (IGNORED_LABEL, *ids[1:]))


@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(10, 80))
def test_packs_hold_every_row_once_within_the_budget(lengths, budget):
    rows = [example(length, 100 * number) for number, length in enumerate(lengths)]
    packs = pack_rows(rows, budget)
    found = []
    for pack in packs:
        assert sum(pack.row_lengths) <= budget or len(pack.row_lengths) == 1
        found += [tuple(part.tolist()) for part in pack.input_ids_T.split(pack.row_lengths)]
    assert sorted(found) == sorted(row.input_ids for row in rows)


def test_positions_restart_and_targets_stay_inside_a_row():
    (pack,) = pack_rows([example(4), example(3, 50)], 100)
    assert pack.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert targets(pack).tolist() == [1, 2, 3, IGNORED_LABEL, 51, 52, IGNORED_LABEL]
    assert pack.labelled == sum(row.labelled for row in (example(4), example(3, 50)))


def test_an_epoch_visits_each_row_once_and_epochs_differ():
    rows = [index for step in range(4) for index in step_rows(10, 3, seed=7, step=step)]
    assert sorted(rows) == list(range(10))
    assert len(step_rows(10, 3, seed=7, step=3)) == 1
    assert epoch_order(10, 7, 0) != epoch_order(10, 7, 1)
    assert epoch_order(10, 7, 0) == epoch_order(10, 7, 0)


def test_processes_share_a_step_without_overlap():
    shares = [rank_share(list(range(7)), rank, 3) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(7))


def test_moving_a_pack_keeps_its_content():
    (pack,) = pack_rows([example(4)], 10)
    assert torch.equal(pack.to(torch.device("cpu")).input_ids_T, pack.input_ids_T)
