"""The deltas are peft's own, for every form of LoRA that can be merged, and what cannot be is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from training.artifact import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from training.deltas import MergeError, read_deltas


@pytest.mark.parametrize("form", [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_updated_weights_are_those_that_peft_merges(tiny_base: Path, tmp_path: Path, form: dict[str, bool]):
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **form))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path)
    deltas = read_deltas(tmp_path)
    after = model.merge_and_unload().state_dict()
    assert len(deltas.a_RI) == 14
    for name in deltas.a_RI:
        torch.testing.assert_close(deltas.applied(name, before[name]), after[name], atol=1e-5, rtol=1e-5)
        assert (after[name] - before[name]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"use_dora": True}, "lora_magnitude_vector"),
    ],
)
def test_more_than_lora_is_refused_by_name(tiny_adapters, tmp_path, change, told):
    adapter = shutil.copytree(tiny_adapters["starter"], tmp_path / "adapter")
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(MergeError, match=told):
        read_deltas(adapter)


def test_numbers_that_are_none_are_named(tiny_adapters, tmp_path):
    adapter = shutil.copytree(tiny_adapters["starter"], tmp_path / "adapter")
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    name = next(name for name in tensors if "layers.1.mlp.up_proj.lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight holds NaN"):
        read_deltas(adapter)
