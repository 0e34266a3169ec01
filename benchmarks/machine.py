"""The machine a benchmark ran on: a number without it is no claim."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "vllm", "fastapi", "uvicorn", "httpx", "locust")
NOTABLE_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # they decide which arithmetic is fast


@dataclass(frozen=True, slots=True)
class Machine:
    """What is not known is None, and what is not installed is absent from `versions`."""

    cpu: str
    cores: int  # that this process may use
    memory_gib: float | None
    cpu_flags: tuple[str, ...]
    gpus: tuple[str, ...]
    system: str
    python: str
    versions: dict[str, str]
    git_revision: str | None  # with "+changes" where the tree differs from it

    @property
    def line(self) -> str:
        """One line for a report's caption."""
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        gpus = "".join(f", {gpu}" for gpu in self.gpus)
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        flags = f" ({' '.join(self.cpu_flags)})" if self.cpu_flags else ""
        return f"{self.cpu}{flags}, {self.cores} cores{memory}{gpus}; Python {self.python}, {packages}"


def describe_machine() -> Machine:
    info = _cpu_info()
    flags = info.get("flags", "").split()
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        cores=_cores(),
        memory_gib=_memory_gib(),
        cpu_flags=tuple(flag for flag in NOTABLE_FLAGS if flag in flags),
        gpus=tuple(
            (_output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader") or "").splitlines()
        ),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions=_versions(),
        git_revision=_git_revision(),
    )


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():  # not Linux
        return {}
    first, _, _ = path.read_text(encoding="utf-8").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # absent, as the class says
    return found


def _git_revision() -> str | None:
    revision = _output("git", "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    return revision + ("+changes" if _output("git", "status", "--porcelain") else "")


def _output(*command: str) -> str | None:
    """Returns what a tool prints, or None where it is not there or fails."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
