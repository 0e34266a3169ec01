"""The machine's description."""

from __future__ import annotations

import os
import platform

from benchmarks.machine import describe_machine


def test_the_machine_is_named_with_its_versions():
    machine = describe_machine()
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.python == platform.python_version()
    assert {"torch", "transformers", "httpx"} <= set(machine.versions)
    assert machine.cpu in machine.line
    assert f"{machine.cores} cores" in machine.line
    assert f"torch {machine.versions['torch']}" in machine.line
