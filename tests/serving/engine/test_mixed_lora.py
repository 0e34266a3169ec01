"""Grouped layers equal the layers they replace, and adapters touch their own tokens only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from serving.engine.engine import Variant, VariantKind
from serving.engine.mixed_lora import (
    ActiveSlices,
    AdapterSlice,
    GroupedLinear,
    LinearGroup,
    LoraFactors,
    group_linears,
)

ONE, TWO = (Variant(name, VariantKind.ADAPTER, name, Path(name)) for name in ("one", "two"))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 24), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)
        self.o_proj = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.o_proj(self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x), self.k_proj(x)], dim=-1))


def test_grouping_a_model_changes_nothing_whatever_the_order_of_its_calls():
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention())
    inputs = torch.randn(1, 5, 16)
    with torch.inference_mode():
        expected = model(inputs)
        members = group_linears(model, ActiveSlices())
        assert torch.allclose(model(inputs), expected, atol=1e-5)
    assert len(members) == 8
    assert not [module for module in model.modules() if isinstance(module, nn.Linear)]
    q_proj, k_proj, o_proj = (members[f"1.{name}"] for name in ("q_proj", "k_proj", "o_proj"))
    assert q_proj.group is k_proj.group
    assert o_proj.group is not q_proj.group


def test_a_new_input_is_never_answered_from_an_old_one():
    group = LinearGroup([nn.Linear(4, 3), nn.Linear(4, 2)], ActiveSlices())
    first, second = GroupedLinear(group, 0), GroupedLinear(group, 1)
    with torch.inference_mode():
        one, other = torch.randn(2, 1, 6, 4)
        expected = second(other)
        first(one)
        assert torch.equal(second(other), expected)


def make_factors(rank: int, out_features: int) -> LoraFactors:
    return LoraFactors(torch.randn(rank, 16), torch.randn(out_features, rank))


def test_each_adapter_changes_its_slice_by_its_own_update():
    torch.manual_seed(0)
    active = ActiveSlices()
    linears = [nn.Linear(16, 24), nn.Linear(16, 8)]
    group = LinearGroup(linears, active)
    one = {0: make_factors(rank=4, out_features=24), 1: make_factors(rank=2, out_features=8)}
    two = {1: make_factors(rank=3, out_features=8)}
    group.attach(ONE, one)
    group.attach(TWO, two)
    inputs = torch.randn(1, 10, 16)
    slices = (AdapterSlice(ONE, 3, 6), AdapterSlice(TWO, 6, 10))
    with torch.inference_mode():
        active.slices = slices
        outputs = [group.output(inputs, member) for member in (0, 1)]
        for member, linear in enumerate(linears):
            expected = linear(inputs)
            for part, factors in zip(slices, (one, two), strict=True):
                if member in factors:
                    x = inputs[:, part.first : part.end]
                    update = x @ factors[member].a_RI.T @ factors[member].b_OR.T
                    expected[:, part.first : part.end] += update
            assert torch.allclose(outputs[member], expected, atol=1e-4)
        group.detach(ONE)
        assert torch.allclose(group.output(inputs, 0), linears[0](inputs), atol=1e-5)
