"""The real vLLM in tests: where they run, a model that its CPU kernels take, an engine on it, and its process.

`make test-vllm` runs them in the environment that has vLLM; elsewhere they are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from serving.engine.vllm_engine import ENVIRONMENT, VllmEngine
from tests.tiny import make_tiny_model

NEEDS_VLLM = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; make test-vllm has it"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # vLLM's own imports warn
]


@contextmanager
def vllm_environment() -> Iterator[None]:
    """What `python -m serving --engine vllm` sets for itself."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


def make_wide_model(directory: Path) -> Path:
    """vLLM's attention on a CPU has no kernel for the 16 features of the other tests' heads."""
    return make_tiny_model(directory, head_dim=32)


def make_engine(base_dir: Path, kind: type[VllmEngine] = VllmEngine, **options) -> VllmEngine:
    return kind(base_dir, **{"max_batch": 8, "max_adapters": 2, "max_rank": 8, "cache_bytes": 2**29, **options})


def engine_process(server_pid: int) -> psutil.Process:
    """Returns the process of vLLM's engine below the one that answers HTTP."""
    children = psutil.Process(server_pid).children(recursive=True)
    (found,) = [child for child in children if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
    return found
