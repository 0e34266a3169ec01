"""The cache is sized by what this process may use, not by the machine around its container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from serving.engine.memory import SHARE_CPU, cache_budget, host_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GIB = 2**30


def write_all(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"memory.max": f"{GIB}\n"}, GIB),
        ("0::/\n", {"memory.max": "max\n"}, MACHINE),
        ("0::/a/b\n", {"a/memory.max": f"{GIB}\n", "a/b/memory.max": "max\n"}, GIB),
        ("0::/a/b\n", {"a/memory.max": f"{2 * GIB}\n", "a/b/memory.max": f"{GIB}\n"}, GIB),
        ("0::/a\n", {"other/memory.max": f"{GIB}\n"}, MACHINE),
        ("5:cpu,memory:/docker/x\n1:name=systemd:/\n", {"memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("5:memory:/a\n", {"memory/a/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, MACHINE),
        (None, {"memory.max": f"{GIB}\n"}, GIB),
        (None, {"memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        (None, {"memory.max/is": "a folder"}, MACHINE),
        (None, {}, MACHINE),
    ],
)
def test_the_smaller_of_machine_and_control_groups_counts(tmp_path, membership, files, expected):
    write_all(tmp_path / "groups", files)
    if membership is not None:
        (tmp_path / "self").write_text(membership)
    assert host_bytes(tmp_path / "groups", tmp_path / "self") == expected


def test_a_cpu_cache_is_a_share_of_what_this_process_may_use():
    assert cache_budget(torch.device("cpu"), GIB // 4) == int(SHARE_CPU * host_bytes()) <= SHARE_CPU * MACHINE


def test_weights_that_fill_the_memory_leave_less_for_the_cache(monkeypatch):
    monkeypatch.setattr("serving.engine.memory.host_bytes", lambda: 20 * GIB)
    budgets = [cache_budget(torch.device("cpu"), gib * GIB) / GIB for gib in (1, 10, 15, 21)]
    assert budgets == pytest.approx([8, 8, 4, 0])
