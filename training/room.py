"""The room for a model that is measured: what memory is free, and what it needs whole or block by block."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from training.base_shape import read_header
from training.errors import TrainingError
from training.ground import shards
from training.memory import NF4_BYTES

_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_FP32 = 4
_USED_SHARE = 0.9  # of what is free, for a model: the rest is for activations and what others take meanwhile
_MEMINFO, _CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_LIMITS = (  # of the two versions of cgroups: the limit, the file of what is held, and its field without pages of files
    ("memory.max", "memory.stat", "anon"),
    ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
)


class RoomError(TrainingError):
    """A limit that even one block at a time exceeds; says which and what is needed."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a model while it is measured, with a copy of its head in fp32, beside the program itself."""

    whole: int
    layerwise: int


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that one model may take; None: most of what is free at the time."""

    given: int | None = None

    def holds(self, need: Need, device: torch.device) -> bool:
        """Whether the model fits whole. Raises RoomError where not even a block of it fits what was given."""
        self.require_block(need)
        if self.given is not None:
            return need.whole <= self.given
        free = free_bytes(device)
        return free is None or need.whole <= _USED_SHARE * free

    def require_block(self, need: Need) -> None:
        """Raises RoomError where a limit was given that one block at a time exceeds too."""
        if self.given is not None and min(need.whole, need.layerwise) > self.given:
            raise RoomError(
                f"--max-memory-gib {self.given / 2**30:.3g} is too little: one block at a time, with the head in "
                f"float32, this model takes {need.layerwise / 2**30:.3g} GiB at the least; give more"
            )


FREE_MEMORY = Room()


def room_of(gib: float | None) -> Room:
    """Raises RoomError for what is no amount of memory."""
    if gib is None:
        return FREE_MEMORY
    if not 0 < gib < math.inf:
        raise RoomError(f"--max-memory-gib {gib}: give a number above 0, or leave it out for what is free")
    return Room(round(gib * 2**30))


def need_of(directory: Path, dtype: torch.dtype, quantised: Collection[str] = ()) -> Need:
    """Returns what a model takes in `dtype`, with the `quantised` weights in NF4; reads headers alone."""
    sizes = {
        name: math.prod(entry["shape"])
        for path in shards(directory)
        for name, entry in read_header(path).items()
        if name != "__metadata__"
    }
    blocks: dict[str, int] = defaultdict(int)
    outside = largest = 0  # the embedding or the head; a block's matrix
    for name, size in sizes.items():
        if match := _BLOCK.search(name):
            blocks[match[1]] += size
            largest = max(largest, size)
        else:
            outside = max(outside, size)
    head = outside * (_FP32 + dtype.itemsize)
    whole = sum(size * (NF4_BYTES if name in quantised else dtype.itemsize) for name, size in sizes.items())
    # A matrix on its way through NF4 is there as stored, as codes and dense.
    block = max(blocks.values(), default=0) * dtype.itemsize + 2 * _FP32 * largest
    return Need(whole=round(whole) + head, layerwise=max(block, head))


def free_bytes(device: torch.device) -> int | None:
    """Returns what can still be allocated there; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not _MEMINFO.is_file():  # not Linux
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_container_bytes()])


def _container_bytes() -> list[int]:
    """Returns what this container's own limit leaves, if it has one; pages of files are given back on demand."""
    found = []
    for limit, stat, field in _LIMITS:
        if not ((_CGROUPS / limit).is_file() and (_CGROUPS / stat).is_file()):
            continue
        text, held = (_CGROUPS / limit).read_text().strip(), (_CGROUPS / stat).read_text().splitlines()
        if text.isdigit():  # else "max"
            found.append(int(text) - int(dict(line.split() for line in held)[field]))
    return found
