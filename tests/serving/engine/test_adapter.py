"""An adapter is applied whole, with peft's own scaling, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serving.engine.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from serving.engine.engine import Variant, VariantKind
from serving.errors import AdapterRejected

PREFIX = "base_model.model."
Q_A = PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = PREFIX + "model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def layers(tiny_base: Path) -> dict[str, tuple[int, int]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {path: (linear.in_features, linear.out_features) for path, linear in linears.items() if path != "lm_head"}


@pytest.fixture
def variant(tiny_adapters: dict[str, Path], tmp_path: Path) -> Variant:
    shutil.copytree(tiny_adapters["starter"], tmp_path / "adapter")
    return Variant("starter", VariantKind.ADAPTER, "1", tmp_path / "adapter")


def change_config(variant: Variant, **fields) -> None:
    path = variant.path / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(variant: Variant, change) -> None:
    tensors = load_file(variant.path / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, variant.path / WEIGHTS_NAME)


def test_every_layer_of_the_adapter_is_read(variant, layers):
    assert set(read_adapter(variant, layers)) == set(layers)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 12, "use_rslora": True},
        {"r": 4, "lora_alpha": 12, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}},
        {"r": 4, "lora_alpha": 12, "alpha_pattern": {"q_proj": 3, r".*\.1\..*o_proj": 30}, "use_rslora": True},
    ],
)
def test_updates_equal_pefts(tiny_base, layers, tmp_path, settings):
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
    model.save_pretrained(tmp_path)
    updates = read_adapter(Variant("a", VariantKind.ADAPTER, "1", tmp_path), layers)
    assert len(updates) == len(layers) == 14
    for layer, factors in updates.items():
        expected = model.base_model.model.get_submodule(layer).get_delta_weight("default")
        assert torch.allclose(factors.b_OR @ factors.a_RI, expected, atol=1e-6), layer


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "also changes the base"),
        ({"a_kind_of_tomorrow": True}, "a_kind_of_tomorrow"),
        ({"r": 5}, r"shape \(4, 64\).*need \(5, 64\)"),
        ({"target_modules": ["q_proj", "w_proj"]}, "'w_proj', and no tensor"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(variant, layers, fields, reason):
    change_config(variant, **fields)
    with pytest.raises(AdapterRejected, match=reason):
        read_adapter(variant, layers)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(Q_B), "q_proj: has lora_A only"),
        (lambda t: t.update({Q_A: t[Q_A][:, :-1].contiguous()}), r"shape \(4, 63\)"),
        (lambda t: t.update({Q_B: torch.full_like(t[Q_B], torch.nan)}), "NaN"),
        (lambda t: t.update({Q_B: torch.full_like(t[Q_B], torch.inf)}), "infinite"),
        (lambda t: t.update({PREFIX + "model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}), "another base"),
        (lambda t: t.update({PREFIX + "lm_head.lora_A.weight": torch.ones(4, 64)}), "lm_head is not supported"),
        (lambda t: t.update({PREFIX + "model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}), "embedding"),
        (lambda t: t.update({Q_A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}), "DoRA"),
        (lambda t: t.clear(), "no tensors|no tensor belongs"),
    ],
)
def test_a_tensor_that_cannot_be_applied_is_refused(variant, layers, change, reason):
    change_tensors(variant, change)
    with pytest.raises(AdapterRejected, match=reason) as caught:
        read_adapter(variant, layers)
    assert "starter" in caught.value.message


def test_a_directory_without_its_files_is_refused(variant, layers):
    (variant.path / WEIGHTS_NAME).write_bytes(b"broken")
    with pytest.raises(AdapterRejected, match="cannot be read"):
        read_adapter(variant, layers)
    (variant.path / CONFIG_NAME).unlink()
    with pytest.raises(AdapterRejected, match="No such file"):
        read_adapter(variant, layers)


def test_many_reasons_are_counted(variant, layers):
    change_tensors(variant, lambda t: t.update({name: torch.full_like(t[name], torch.nan) for name in t}))
    with pytest.raises(AdapterRejected, match="and 23 more"):
        read_adapter(variant, layers)
