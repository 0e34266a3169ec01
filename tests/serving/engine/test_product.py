"""A product is that of its layers, whatever format keeps their weights, and the format takes what it says."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import nn

from serving.engine.engine import WeightFormat
from serving.engine.product import arithmetic_dtype, is_nf4, make_product

ROWS = [1, 2, 7, 33, 130]


def quantised(layer: nn.Linear, *, nested: bool = True) -> bitsandbytes.nn.Linear4bit:
    """Returns the layer in NF4, as transformers makes it from a checkpoint."""
    made = bitsandbytes.nn.LinearNF4(
        layer.in_features, layer.out_features, layer.bias is not None, torch.float32, compress_statistics=nested
    )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu").requires_grad_(False)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_equals_the_layer(rows, bias):
    layer = nn.Linear(48, 80, bias=bias)
    inputs = torch.randn(1, rows, 48)
    with torch.inference_mode():
        assert torch.allclose(make_product([layer]).run(inputs), layer(inputs), atol=1e-5)


@pytest.mark.parametrize("weights", WeightFormat)
def test_layers_stand_side_by_side_in_their_order(weights):
    layers = [nn.Linear(64, 80), nn.Linear(64, 16, bias=False), nn.Linear(64, 16)]
    if weights is WeightFormat.NF4:
        layers = [quantised(layer) for layer in layers]
    inputs = torch.randn(1, 5, 64)
    with torch.inference_mode():
        alone = [make_product([layer], weights).run(inputs) for layer in layers]
        assert torch.allclose(make_product(layers, weights).run(inputs), torch.cat(alone, -1), atol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("features", [64, 24], ids=["whole blocks", "blocks across layers"])
def test_layers_in_nf4_give_what_bitsandbytes_gives(rows, nested, features):
    layers = [quantised(nn.Linear(features, width), nested=nested) for width in (80, 10)]
    inputs = torch.randn(1, rows, features)
    with torch.inference_mode():
        found = make_product(layers).run(inputs)
        expected = torch.cat([layer(inputs) for layer in layers], -1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_layer_in_nf4_is_known_as_such_and_computes_in_its_own_dtype():
    layer = nn.Linear(64, 8)
    assert (is_nf4(layer), arithmetic_dtype(layer)) == (False, torch.float32)
    assert is_nf4(quantised(layer))
    assert arithmetic_dtype(quantised(layer)) == torch.float32
    assert not is_nf4(nn.LayerNorm(4))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_fp16_multiplies_by_the_weight_rounded_to_16_bits(rows, bias):
    layer = nn.Linear(48, 80, bias=bias)
    inputs = torch.randn(1, rows, 48)
    with torch.inference_mode():
        expected = nn.functional.linear(inputs, layer.weight.half().float(), layer.bias)
        assert torch.allclose(make_product([layer], WeightFormat.FP16).run(inputs), expected, atol=1e-5)


def test_a_format_takes_the_memory_that_it_says():
    layer = nn.Linear(512, 512, bias=False)
    plain = make_product([layer]).size_bytes
    assert plain == 512 * 512 * 4
    assert make_product([layer], WeightFormat.FP16).size_bytes == 512 * 512 * 2
    assert make_product([quantised(layer)]).size_bytes == 512 * 512 // 2 + 512 * 512 // 64 * 4
