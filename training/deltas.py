"""The deltas of an adapter: what it makes of each base weight, by peft's formulas of LoRA and DoRA."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from training.artifact import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from training.errors import TrainingError

# R rank, I input features, O output features
_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
_NOT_LORA = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
)


class MergeError(TrainingError):
    """An adapter and a base that do not fit together; says which tensor or file, and why."""


@dataclass(frozen=True, slots=True)
class Deltas:
    """The updates of an adapter by base weight name: W + scale * B @ A; DoRA then sets the length of each row."""

    a_RI: Mapping[str, torch.Tensor]
    b_OR: Mapping[str, torch.Tensor]
    magnitude_O: Mapping[str, torch.Tensor]  # DoRA's; empty for LoRA
    scale: float

    def applied(self, name: str, weight_OI: torch.Tensor) -> torch.Tensor:
        """Returns the updated weight in fp32. Raises MergeError where the shapes differ."""
        a, b = self.a_RI[name].float(), self.b_OR[name].float()
        if (b.shape[0], a.shape[1]) != tuple(weight_OI.shape):
            raise MergeError(
                f"{name}: the adapter's update is {(b.shape[0], a.shape[1])}, the weight {tuple(weight_OI.shape)}"
            )
        updated = torch.addmm(weight_OI.float(), b, a, alpha=self.scale)
        if name in self.magnitude_O:
            updated *= (self.magnitude_O[name].float() / updated.norm(dim=1))[:, None]
        return updated


def read_deltas(adapter_dir: Path) -> Deltas:
    """Raises MergeError for adapters that are more than LoRA or DoRA on linear layers."""
    config = json.loads((adapter_dir / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    _refuse_more_than_lora(adapter_dir / ADAPTER_CONFIG, config)
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    for key, tensor in load_file(adapter_dir / ADAPTER_WEIGHTS).items():
        module, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if part not in parts:
            raise MergeError(f"{adapter_dir / ADAPTER_WEIGHTS}: {key}: not a weight of LoRA or DoRA")
        if not tensor.isfinite().all():
            raise MergeError(f"{adapter_dir / ADAPTER_WEIGHTS}: {key} holds NaN or infinity; train it again")
        parts[part][module + ".weight"] = tensor
    a, b, magnitude = (parts[part] for part in _PARTS)
    if a.keys() != b.keys() or (config.get("use_dora") and magnitude.keys() != a.keys()):
        raise MergeError(f"{adapter_dir / ADAPTER_WEIGHTS}: some modules lack one of {', '.join(_PARTS)}")
    return Deltas(a, b, magnitude, scale)


def _refuse_more_than_lora(path: Path, config: Mapping[str, Any]) -> None:
    for key in _NOT_LORA:
        if config.get(key):
            raise MergeError(f"{path}: {key} = {config[key]!r} cannot be merged; only LoRA and DoRA can")
    if config.get("bias", "none") != "none":
        raise MergeError(f"{path}: bias = {config['bias']!r} cannot be merged; train with 'none'")
