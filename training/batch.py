"""Packs: several rows in one unpadded sequence, each attending to itself alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch

from training.chat import IGNORED_LABEL, TrainExample


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows end to end; T = sum of `row_lengths`. Positions restart at 0 with each row."""

    input_ids_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64, unshifted, -100 where nothing is trained
    position_ids_T: torch.Tensor  # int64
    row_lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Pack:
        return Pack(
            self.input_ids_T.to(device), self.labels_T.to(device), self.position_ids_T.to(device), self.row_lengths
        )

    @property
    def labelled(self) -> int:
        return int((targets(self) != IGNORED_LABEL).sum())


def targets(pack: Pack) -> torch.Tensor:
    """Returns the label that each position predicts, int64 [T]: the next one in its row, -100 at a row's end."""
    shifted = torch.full_like(pack.labels_T, IGNORED_LABEL)
    shifted[:-1] = pack.labels_T[1:]
    ends = torch.tensor(pack.row_lengths, device=shifted.device).cumsum(0) - 1
    shifted[ends] = IGNORED_LABEL
    return shifted


def pack_rows(examples: Sequence[TrainExample], budget: int) -> list[Pack]:
    """Returns packs of at most `budget` tokens, first fit on rows by falling length; a longer row is a pack alone."""
    bins: list[list[TrainExample]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: len(example.input_ids), reverse=True):
        size = len(example.input_ids)
        place = next((at for at, free in enumerate(room) if free >= size), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = len(bins) - 1
        bins[place].append(example)
        room[place] -= size
    return [join_rows(rows) for rows in bins]


@lru_cache(maxsize=2)  # a step asks for its epoch's order; shuffling 52,000 rows takes 30 ms
def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Returns the row indices of one epoch, shuffled; the same for the same arguments on every machine."""
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def step_rows(rows: int, batch_size: int, seed: int, step: int) -> tuple[int, ...]:
    """Returns the row indices of optimizer step `step` (0-based); an epoch's last step takes what is left."""
    per_epoch = -(-rows // batch_size)
    epoch, within = divmod(step, per_epoch)
    return epoch_order(rows, seed, epoch)[within * batch_size : (within + 1) * batch_size]


def rank_share(indices: Sequence[int], rank: int, world: int) -> list[int]:
    """Returns the rows of one process of `world`: each row once over all of them."""
    return list(indices[rank::world])


def join_rows(rows: Sequence[TrainExample]) -> Pack:
    """Returns the rows end to end, as they come."""
    return Pack(
        torch.tensor(list(chain.from_iterable(row.input_ids for row in rows))),
        torch.tensor(list(chain.from_iterable(row.labels for row in rows))),
        torch.cat([torch.arange(len(row.input_ids)) for row in rows]),
        tuple(len(row.input_ids) for row in rows),
    )
