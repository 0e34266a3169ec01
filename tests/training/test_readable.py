"""A model that is whole in memory gives each pass's states; rounding anew moves weights as a rounding would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.artifact import read_manifest
from training.batch import join_rows
from training.chat import TrainExample
from training.ground import Onto
from training.readable import Pass, rounded_anew
from training.reading import load_adapted, load_merged


def test_a_pass_without_the_adapter_is_the_base_alone(tiny_base: Path, tiny_adapters: dict[str, Path]):
    cpu = torch.device("cpu")
    pack = join_rows([TrainExample(tuple(range(5, 25)), tuple(range(5, 25)))])
    manifest = read_manifest(tiny_adapters["starter"])
    adapted = load_adapted(tiny_adapters["starter"], tiny_base, manifest, Onto.PLAIN, torch.float32, cpu)
    on, off, again = adapted.hidden([Pass(pack), Pass(pack, adapter=False), Pass(pack)])
    (base,) = load_merged(tiny_base, cpu).hidden([Pass(pack)])
    assert torch.equal(off, base)
    assert torch.equal(on, again)
    assert not torch.allclose(on, off)
    assert not adapted.nf4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_anew_has_a_rounding_errors_size_and_keeps_zeros(dtype: torch.dtype):
    before = torch.randn(400, 400, generator=torch.Generator().manual_seed(0)).to(dtype)
    before[:, 0] = 0
    kept = before.clone()
    after = rounded_anew(before, 0)
    assert torch.equal(before, kept)
    steps = after.view(torch.int16).int() - before.view(torch.int16).int()
    assert (after[:, 0] == 0).all()
    assert after.isfinite().all()
    assert set(steps.unique().tolist()) == {-1, 0, 1}
    assert steps[:, 1:].double().var().item() == pytest.approx(1 / 12, rel=0.05)
    assert abs(steps.double().mean().item()) < 0.005
    assert not torch.equal(rounded_anew(before, 1), after)
