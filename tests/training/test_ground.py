"""The ground of a dequantised merge is bit for bit what NF4 training computes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.artifact import read_manifest
from training.deltas import MergeError
from training.ground import Onto, ground_of, quantised_names, read_weight, shard_of
from training.model import load_base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_weights_are_those_of_the_trained_model(tiny_base: Path, tiny_adapters, dtype: torch.dtype):
    model = load_base(tiny_base, "nf4", dtype, torch.device("cpu"))
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert len(layers) == 14
    assert quantised_names(tiny_base) == layers.keys()
    changes = {"quantisation": "nf4-double", "compute_dtype": str(dtype).removeprefix("torch.")}
    manifest = read_manifest(tiny_adapters["starter"]).model_copy(update=changes)
    ground = ground_of(tiny_base, manifest, Onto.DEQUANTISED)
    for name, path in shard_of(tiny_base).items():
        stored = read_weight(path, name)
        if name in layers:
            layer = layers[name]
            eye = torch.eye(layer.in_features, dtype=dtype)
            assert torch.equal(ground.weight(name, stored), layer(eye).T), name
            assert not torch.equal(ground.weight(name, stored).float(), stored)
        else:
            assert ground.weight(name, stored) is stored


def test_a_plain_ground_is_the_base_as_stored(tiny_base, tiny_adapters):
    ground = ground_of(tiny_base, read_manifest(tiny_adapters["starter"]), Onto.PLAIN)
    stored = torch.ones(2, 2)
    assert ground.weight("model.layers.0.self_attn.q_proj.weight", stored) is stored


def test_an_adapter_trained_on_plain_weights_has_nothing_to_dequantise(tiny_base, tiny_adapters):
    with pytest.raises(MergeError, match="--onto plain"):
        ground_of(tiny_base, read_manifest(tiny_adapters["starter"]), Onto.DEQUANTISED)
