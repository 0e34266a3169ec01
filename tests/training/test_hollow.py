"""A hollow model holds nothing until it is filled, and is then the model that is loaded whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from training import attention
from training.hollow import HollowError, hollow_base
from training.model import nf4_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("storage", [None, torch.uint8, torch.float32])
def test_a_filled_model_is_the_one_that_is_loaded_whole(tiny_base: Path, storage: torch.dtype | None):
    quantised = nf4_config(torch.float32, storage) if storage else None
    hollow = hollow_base(tiny_base, torch.float32, CPU, quantised)
    held = sum(parameter.untyped_storage().nbytes() for parameter in hollow.model.parameters())
    assert held == 4 * len(list(hollow.model.parameters()))
    hollow.fill(hollow.slots, hollow.read)
    whole = AutoModelForCausalLM.from_pretrained(
        tiny_base,
        attn_implementation=attention.NAME,
        device_map={"": CPU},
        **({"quantization_config": quantised} if quantised else {}),
    )
    expected = dict(whole.named_parameters())
    for name, parameter in hollow.model.named_parameters():
        assert type(parameter) is type(expected[name])
        left, right = (found.data.view(torch.uint8) for found in (parameter, expected[name]))  # codes may spell NaN
        assert torch.equal(left, right), name
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(hollow.model(ids).logits, whole(ids).logits)


def test_weights_under_other_names_are_refused_by_name(tiny_base: Path, tmp_path: Path):
    (shard,) = tiny_base.glob("*.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    weights = {name.replace("gate_proj", "w1"): weight for name, weight in load_file(shard).items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HollowError, match=r"have no model\.layers\.0\.mlp\.gate_proj\.weight"):
        hollow_base(tmp_path, torch.float32, CPU)
