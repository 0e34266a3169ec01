"""A run is put together from its recipe alone: what a launcher would change besides is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.recipes import small_config
from training.model import ModelError
from training.run import assemble


def test_accumulation_by_the_launcher_is_refused(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """accelerate reads it from the environment: each pass's gradient would be a quarter."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    config = small_config(tiny_base, tmp_path)
    with pytest.raises(ModelError, match=r"ACCUMULATION_STEPS = 4: .*optim\.batch_size"):
        assemble(config, tmp_path, tmp_path)
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    assert assemble(config, tmp_path, tmp_path).accelerator.gradient_accumulation_steps == 1
