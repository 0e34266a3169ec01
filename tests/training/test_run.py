"""A run is put together from its recipe alone: what a launcher would change besides is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.recipes import small_config
from training.model import ModelError
from training.run import assemble, heed_launcher


def test_accumulation_by_the_launcher_is_refused(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """accelerate reads it from the environment: each pass's gradient would be a quarter."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    config = small_config(tiny_base, tmp_path)
    with pytest.raises(ModelError, match=r"ACCUMULATION_STEPS = 4: .*optim\.batch_size"):
        assemble(config, tmp_path, tmp_path)
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    assert assemble(config, tmp_path, tmp_path).accelerator.gradient_accumulation_steps == 1


@pytest.mark.parametrize(("asked", "dtype"), [("bf16", "float32"), ("fp8", "float32"), ("fp16", "auto")])
def test_another_precision_than_the_recipes_is_refused(tiny_base, tmp_path, monkeypatch, asked, dtype):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with pytest.raises(ModelError, match=rf"--mixed_precision {asked} .* is not model\.dtype = '{dtype}'"):
        assemble(small_config(tiny_base, tmp_path, model={"dtype": dtype}), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("asked", "precision", "told"),
    [("no", "bf16", True), ("no", "no", False), ("bf16", "bf16", False), (None, "bf16", False)],
)
def test_a_launcher_that_says_no_is_told_what_runs(monkeypatch, capsys, asked, precision, told):
    """It says so too where it was asked for nothing."""
    if asked is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    heed_launcher(precision, "auto", torch.bfloat16 if precision == "bf16" else torch.float32)
    line = "the launcher's mixed precision 'no' does not apply: model.dtype = 'auto', which is bfloat16 here"
    assert (line in capsys.readouterr().err) == told
