"""A LoRA adapter's tensors, read from disk and checked against the layers they would change."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from serving.engine.engine import Variant
from serving.engine.mixed_lora import LoraFactors
from serving.errors import AdapterRejected

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
TENSOR_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")
# Settings that change training, or nothing, but not what the saved matrices mean. Any other one that is set is refused.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config",
}  # fmt: skip
PLAIN_INITS = (True, False, None, "gaussian", "eva")  # others (pissa, olora, loftq, ...) also change the base's weights


class AdapterConfig(BaseModel):
    """What is read of peft's adapter_config.json; the rest is in `model_extra`."""

    model_config = ConfigDict(extra="allow")

    peft_type: Literal["LORA"]
    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    bias: Literal["none"] = "none"
    init_lora_weights: Any = True
    target_modules: list[str] | str | None = None

    def scaling(self, layer: str) -> float:
        alpha = _by_pattern(self.alpha_pattern, layer, self.lora_alpha)
        rank = self.rank(layer)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank(self, layer: str) -> int:
        return int(_by_pattern(self.rank_pattern, layer, self.r))


def read_adapter(variant: Variant, layers: Mapping[str, tuple[int, int]]) -> dict[str, LoraFactors]:
    """Returns the updates of an adapter directory by layer; `layers` holds (in, out) features of each layer there is.

    Raises AdapterRejected, with all reasons, unless every tensor of the adapter can be applied.
    """
    config = _read_config(variant)
    tensors = _read_tensors(variant)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None or match["layer"] not in layers:
            problems.append(f"{name}: {_why_unknown(name)}")
        else:
            halves.setdefault(match["layer"], {})[match["half"]] = tensor.float()
    for layer, pair in halves.items():
        problems += _pair_problems(layer, pair, config.rank(layer), *layers[layer])
    problems += _missing_targets(config, halves)
    if problems or not halves:
        raise _rejected(variant, problems or [f"{WEIGHTS_NAME} holds no tensors"])
    return {layer: LoraFactors(pair["A"], pair["B"] * config.scaling(layer)) for layer, pair in halves.items()}


def _read_config(variant: Variant) -> AdapterConfig:
    path = variant.path / CONFIG_NAME
    try:
        config = AdapterConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _rejected(variant, [f"{path} cannot be read ({error.strerror}); give a peft adapter directory"]) from None
    except ValidationError as error:
        details = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}, got {item['input']!r}" for item in error.errors()
        ]
        raise _rejected(variant, [f"{CONFIG_NAME}: {detail}" for detail in details]) from None
    problems = [
        f"{CONFIG_NAME}: {name}={value!r} is not supported; train plain LoRA"
        for name, value in (config.model_extra or {}).items()
        if value and name not in HARMLESS
    ]
    if config.init_lora_weights not in PLAIN_INITS:
        problems.append(
            f"{CONFIG_NAME}: init_lora_weights={config.init_lora_weights!r} also changes the base's weights; "
            "save the adapter converted to plain LoRA"
        )
    if problems:
        raise _rejected(variant, problems)
    return config


def _read_tensors(variant: Variant) -> dict[str, torch.Tensor]:
    try:
        return load_file(variant.path / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise _rejected(variant, [f"{WEIGHTS_NAME} cannot be read: {error}"]) from None


def _pair_problems(
    layer: str, pair: Mapping[str, torch.Tensor], rank: int, in_features: int, out_features: int
) -> list[str]:
    if set(pair) != {"A", "B"}:
        return [f"{layer}: has lora_{min(pair)} only; both halves are needed"]
    problems = []
    for half, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
        if tuple(pair[half].shape) != shape:
            problems.append(f"{layer}.lora_{half}: shape {tuple(pair[half].shape)}, this base and rank need {shape}")
        if not torch.isfinite(pair[half]).all():
            problems.append(f"{layer}.lora_{half}: holds NaN or infinite values")
    return problems


def _missing_targets(config: AdapterConfig, layers: Iterable[str]) -> list[str]:
    if not isinstance(config.target_modules, list):
        return []
    found = [f".{layer}" for layer in layers]
    wanted = sorted(config.target_modules)  # peft writes a set: its order differs from run to run
    missing = [name for name in wanted if not any(layer.endswith(f".{name}") for layer in found)]
    return [f"target_modules names {name!r}, and no tensor belongs to it" for name in missing]


def _why_unknown(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "DoRA is not supported"
    if "lora_embedding" in name or "lm_head" in name or "embed_tokens" in name:
        return "an adapter of the embedding or of lm_head is not supported"
    return "no linear layer of this base belongs to it; was the adapter trained on another base?"


def _by_pattern(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """peft's rule: the first pattern that matches the end of the layer's path."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def _rejected(variant: Variant, problems: list[str]) -> AdapterRejected:
    shown = problems[:5] + ([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])
    return AdapterRejected(f"adapter {variant.name!r} ({variant.path}): " + "; ".join(shown), param="model")
