"""Twins: rows that nearly repeat an earlier row, found without a miss by a prefix filter over word n-grams."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from training.rows import Conversation
from training.words import words

SIMILARITY = 0.7  # Jaccard's, of the word 3-grams of prompt and reply
_GRAM = 3
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it is one to one

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Twin:
    """Rows by number; `similarity`: the share of both rows' word 3-grams that both have, 0 to 1."""

    row: int
    earlier: int
    similarity: float


def find_twins(conversations: Sequence[Conversation], similarity: float = SIMILARITY) -> list[Twin]:
    """Returns one twin for each row that has an earlier row at least that similar.

    Two sets of n and m grams can only be that similar where the rarest n - ceil(similarity n) + 1 of the one hold one
    of the other's (Bayardo et al. 2007), so few pairs are compared, and none that counts is missed.
    """
    grams = _by_rarity(conversations)
    shared = defaultdict[int, list[int]](list)  # gram -> earlier rows that have it among their rarest
    found = []
    for at, own in enumerate(grams):
        rarest = own[: len(own) - int(np.ceil(similarity * len(own))) + 1].tolist()
        twin = _first_twin(at, rarest, grams, shared, similarity)
        if twin is not None:
            found.append(Twin(conversations[at].number, conversations[twin[0]].number, twin[1]))
        for gram in rarest:
            shared[gram].append(at)
    return found


def _first_twin(
    at: int, rarest: Sequence[int], grams: Sequence[Integers], shared: dict[int, list[int]], similarity: float
) -> tuple[int, float] | None:
    seen = set[int]()
    size = len(grams[at])
    for gram in rarest:
        for other in shared.get(gram, ()):
            smaller, larger = sorted((size, len(grams[other])))
            if other in seen or smaller < similarity * larger:
                continue
            seen.add(other)
            both = len(np.intersect1d(grams[at], grams[other], assume_unique=True))
            if both >= similarity * (size + len(grams[other]) - both):
                return other, both / (size + len(grams[other]) - both)
    return None


def _by_rarity(conversations: Sequence[Conversation]) -> list[Integers]:
    """Returns each row's different grams as ranks in the whole set, the rarest first."""
    grams, rows = _grams(conversations)
    _, ids, counts = np.unique(grams, return_inverse=True, return_counts=True)
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.lexsort((np.arange(len(counts)), counts))] = np.arange(len(counts))
    keys = np.sort(rows * len(counts) + ranks[ids])
    keys = keys[np.diff(keys, prepend=-1) > 0]  # np.unique hashes first, which takes five times as long here
    by_row, rank = np.divmod(keys, max(len(counts), 1))
    return np.split(rank, np.searchsorted(by_row, np.arange(1, len(conversations))))


def _grams(conversations: Sequence[Conversation]) -> tuple[npt.NDArray[np.uint64], Integers]:
    """Returns a 64-bit hash of the gram that begins at each word, and that word's row; a row's end is filled up."""
    vocabulary = defaultdict[str, int](count(1).__next__)
    texts = (f"{chat.prompt_text}\n{chat.reply_text}" for chat in conversations)
    ids = [[*(vocabulary[word] for word in words(text)), *[0] * (_GRAM - 1)] for text in texts]
    flat = np.fromiter((id for row in ids for id in row), dtype=np.uint64)
    rows = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    hashes = np.zeros(len(flat), dtype=np.uint64)
    for offset in range(_GRAM):
        hashes = (hashes ^ np.roll(flat, -offset)) * _MIX
        hashes ^= hashes >> np.uint64(29)
    begins_gram = np.concatenate([np.arange(len(row)) < len(row) - _GRAM + 1 for row in ids] or [np.zeros(0, bool)])
    return hashes[begins_gram], rows[begins_gram]
