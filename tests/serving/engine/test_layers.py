"""The layers named from a configuration are those that an adapter of the base has tensors for."""

from __future__ import annotations

from serving.engine.adapter import read_adapter
from serving.engine.engine import Variant, VariantKind
from serving.engine.layers import linear_layers


def test_the_layers_are_those_of_an_adapter_of_all_linear_layers(tiny_base, tiny_adapters):
    layers = linear_layers(tiny_base)
    variant = Variant("starter", VariantKind.ADAPTER, "1", tiny_adapters["starter"])
    assert set(read_adapter(variant, layers)) == set(layers)
    assert layers["model.layers.1.self_attn.k_proj"] == (64, 32)
    assert layers["model.layers.0.mlp.down_proj"] == (128, 64)
    assert len(layers) == 14


def test_the_head_is_no_layer(tiny_base):
    assert not [name for name in linear_layers(tiny_base) if "lm_head" in name]
