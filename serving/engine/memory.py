"""The memory budget: how many bytes the key/value cache may take on this machine and in this container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

SHARE_CPU, SHARE_LEFT = 0.4, 0.8  # of all memory, where weights take less than half; of what the weights leave
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cache_budget(device: torch.device, weights_bytes: int) -> int:
    """Returns the bytes that a cache may take beside the loaded weights; on a GPU as much as is free now allows."""
    if device.type == "cpu":
        memory = host_bytes()
        return int(min(SHARE_CPU * memory, SHARE_LEFT * max(memory - weights_bytes, 0)))
    torch.cuda.empty_cache()  # what loading used and gave back is free too
    return int(SHARE_LEFT * torch.cuda.mem_get_info(device)[0])


def host_bytes(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Returns the smaller of the machine's memory and what the control groups of this process allow."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min((pages, *_limits(cgroups, membership)))


def _limits(cgroups: Path, membership: Path) -> Iterator[int]:
    """Yields the limits of this process's groups and of those around them; a container sees its own as the root."""
    for line in ["0::/", "0:memory:/", *_read(membership).splitlines()]:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):  # version 1
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            if (limit := _read(root / folder / name).strip()).isdecimal():  # "max" is no limit
                yield int(limit)


def _read(path: Path) -> str:
    """Returns "" for a file that is not there or not ours to read: then it limits nothing that we could know."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
