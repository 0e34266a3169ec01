"""The ground of a merge: the base weights it adds to, as they are stored or as NF4 left them in training."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from training.artifact import AdapterManifest
from training.deltas import MergeError
from training.quantised import nf4_round_trip


class Onto(enum.Enum):
    """Which base weights an adapter is merged onto."""

    PLAIN = "plain"
    DEQUANTISED = "dequantised"


@dataclass(frozen=True, slots=True)
class Ground:
    base_dir: Path
    quantised: frozenset[str]  # names of the weights to send through NF4
    compute_dtype: torch.dtype  # of NF4 training: a weight is cast to it before it is quantised

    def weight(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        return nf4_round_trip(stored.to(self.compute_dtype)) if name in self.quantised else stored


def ground_of(base_dir: Path, manifest: AdapterManifest, onto: Onto) -> Ground:
    """Raises MergeError where an adapter that was trained on plain weights asks for dequantised ones."""
    dtype: torch.dtype = getattr(torch, manifest.compute_dtype)
    if onto is Onto.PLAIN:
        return Ground(base_dir, frozenset(), dtype)
    if not trained_on_nf4(manifest):
        raise MergeError(
            f"{manifest.name} was trained with quantisation = {manifest.quantisation!r}: there are no NF4 weights to "
            "dequantise; merge it with --onto plain"
        )
    return Ground(base_dir, quantised_names(base_dir), dtype)


def trained_on_nf4(manifest: AdapterManifest) -> bool:
    return manifest.quantisation.startswith("nf4")


def quantised_names(base_dir: Path) -> frozenset[str]:
    """Returns the names of the weights that loading in NF4 quantises, by transformers' own rule; reads no weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(base_dir)))
    kept = get_keys_to_not_convert(model)
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and should_convert_module(name, kept)
    )


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def shard_of(directory: Path) -> Mapping[str, Path]:
    """Returns the file of each weight in a model directory, by weight name."""
    found: dict[str, Path] = {}
    for path in shards(directory):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def read_weight(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]
