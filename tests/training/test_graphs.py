"""Replayed graphs give the hidden states and gradients of the decoder itself, for packs of every size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.test_lora_linear import adapted
from training.batch import Pack
from training.config import LoraConfig
from training.graphs import GRANULE, GraphedDecoder
from training.model import PackLoss, add_lora, load_base

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an Ampere GPU or later"
)
BOUNDS = {"most_tokens": 3 * GRANULE, "most_rows": 4, "longest_row": 2 * GRANULE}


def pack_of(*lengths: int) -> Pack:
    ids = torch.randint(3, 390, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))
    return Pack(ids, ids, torch.cat([torch.arange(length) for length in lengths]), lengths)


def on_gpu(base: Any, dropout: float = 0.0) -> PackLoss:
    device = torch.device("cuda")
    model = add_lora(load_base(base, "none", torch.bfloat16, device), LoraConfig(rank=4, dropout=dropout), 1)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return PackLoss(model).train()


def step(loss: PackLoss, *packs: Pack) -> tuple[float, torch.Tensor]:
    device, total = torch.device("cuda"), 0.0
    loss.zero_grad()
    torch.manual_seed(5)
    for pack in packs:
        with torch.autocast("cuda", torch.bfloat16):
            nll = loss(pack.to(device))
        nll.backward()
        total += float(nll.detach())
    return total, torch.cat([each.grad.flatten() for each in loss.parameters() if each.requires_grad])


@needs_gpu
def test_steps_of_several_packs_equal_those_without_graphs(tiny_base):
    plain, graphed = on_gpu(tiny_base), on_gpu(tiny_base)
    graphed.use_graphs(**BOUNDS)
    for lengths in [((60, 40), (200,)), ((100,),), ((256, 100), (3, 3, 3, 3)), ((60, 40), (200,))]:
        packs = [pack_of(*each) for each in lengths]
        loss, gradient = step(graphed, *packs)
        expected, wanted = step(plain, *packs)
        assert loss == pytest.approx(expected, rel=1e-3)
        assert float((gradient - wanted).norm() / wanted.norm()) < 2e-2  # bf16


@needs_gpu
def test_dropout_follows_the_seed_whatever_was_captured_before(tiny_base):
    first, second = on_gpu(tiny_base, dropout=0.5), on_gpu(tiny_base, dropout=0.5)
    for each in (first, second):
        each.use_graphs(**BOUNDS)
    step(second, pack_of(250))
    once, again = step(first, pack_of(100, 20)), step(second, pack_of(100, 20))
    assert once[0] == again[0]
    torch.testing.assert_close(once[1], again[1], rtol=1e-2, atol=1e-4)  # attention's backward adds in any order
    assert step(first, pack_of(100, 20))[0] == once[0]


@needs_gpu
def test_a_restart_takes_smaller_packs(tiny_base):
    loss = on_gpu(tiny_base)
    loss.use_graphs(**BOUNDS)
    before = step(loss, pack_of(100, 20))
    assert loss.graphs is not None
    loss.graphs.restart(GRANULE)
    assert step(loss, pack_of(100, 20))[0] == pytest.approx(before[0], rel=1e-3)


@needs_gpu
@pytest.mark.parametrize("lengths", [(300,), (10,) * 5])
def test_a_pack_beyond_the_bounds_is_refused(tiny_base, lengths):
    loss = on_gpu(tiny_base)
    loss.use_graphs(**BOUNDS)
    with pytest.raises(ValueError, match=f"a pack of {len(lengths)} rows up to {max(lengths)} tokens"):
        loss(pack_of(*lengths).to(torch.device("cuda")))


def test_padding_is_a_row_of_its_own_and_missing_rows_are_empty(tiny_base):
    trained = [each for each in adapted(tiny_base).parameters() if each.requires_grad]
    graphs = GraphedDecoder(None, trained, **BOUNDS)
    assert graphs.bounds((100, 20), 256).tolist() == [0, 100, 120, 256, 256, 256]
    assert graphs.bounds((64, 64, 64, 64), 256).tolist() == [0, 64, 128, 192, 256, 256]
