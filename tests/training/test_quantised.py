"""NF4 weights are made dense again as bitsandbytes does it."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch

from training.quantised import dense, parts_of


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_weight_becomes_what_bitsandbytes_makes_of_it(nested, dtype):
    weight = torch.randn(96, 128, dtype=dtype)
    quantised = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=nested
    ).to("cpu")
    assert quantised.quant_state.nested is nested
    parts, how = parts_of(quantised)
    found = dense(*parts, how)
    assert found.dtype == dtype
    assert found.shape == (96, 128)
    torch.testing.assert_close(found, bitsandbytes.functional.dequantize_4bit(quantised.data, quantised.quant_state))
    assert float((found - weight).float().norm() / weight.float().norm()) < 0.2


def test_a_plain_weight_stays_as_it_is():
    weight = torch.nn.Parameter(torch.randn(4, 8))
    parts, how = parts_of(weight)
    assert how is None
    torch.testing.assert_close(dense(*parts, how), weight.detach())
