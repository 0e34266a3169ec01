"""Merges an adapter into its base, shard by shard in fp32, into a model directory that stands alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from training.artifact import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CERTIFICATE_NAME,
    MergeCertificate,
    fingerprint_base,
    verify_adapter,
)
from training.errors import TrainingError

_PREFIX = "base_model.model."
_COPIED = ("config.json", "generation_config.json", "model.safetensors.index.json")


class MergeError(TrainingError):
    """An adapter and a base that do not fit together; says which tensor or file, and why."""


@dataclass(frozen=True, slots=True)
class Deltas:
    """The low-rank updates of an adapter by base weight name: W + scale * B @ A."""

    a_RI: Mapping[str, torch.Tensor]  # R rank, I input features, O output features
    b_OR: Mapping[str, torch.Tensor]
    scale: float

    def delta_OI(self, name: str) -> torch.Tensor:
        return self.scale * (self.b_OR[name].float() @ self.a_RI[name].float())


def read_deltas(adapter_dir: Path) -> Deltas:
    """Raises MergeError for adapters that are more than plain LoRA on linear layers."""
    config = json.loads((adapter_dir / ADAPTER_CONFIG).read_text())
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(key):
            raise MergeError(
                f"{adapter_dir / ADAPTER_CONFIG}: {key} = {config[key]!r} cannot be merged; only plain LoRA can"
            )
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    halves: dict[str, dict[str, torch.Tensor]] = {"lora_A": {}, "lora_B": {}}
    for key, tensor in load_file(adapter_dir / ADAPTER_WEIGHTS).items():
        module, _, half = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if half not in halves:
            raise MergeError(f"{adapter_dir / ADAPTER_WEIGHTS}: {key}: not a plain LoRA weight")
        halves[half][module + ".weight"] = tensor
    if halves["lora_A"].keys() != halves["lora_B"].keys():
        raise MergeError(f"{adapter_dir / ADAPTER_WEIGHTS}: some modules have only one of lora_A and lora_B")
    return Deltas(halves["lora_A"], halves["lora_B"], scale)


def merge(
    adapter_dir: Path, base_dir: Path, out: Path, dtype: torch.dtype | None, certify: Callable[[Path], MergeCertificate]
) -> MergeCertificate:
    """Writes the merged model in `dtype`, or each weight's own, and has it certified; `out` changes only if it passed.

    Holds one shard in memory at a time. Raises ArtifactError or MergeError where adapter and base do not fit, and where
    `out` holds anything but an earlier merge.
    """
    manifest = verify_adapter(adapter_dir)
    if fingerprint_base(base_dir) != manifest.base.fingerprint:
        raise MergeError(
            f"{base_dir} is not the base of {adapter_dir}: its fingerprint is not "
            f"{manifest.base.fingerprint[:12]} ({manifest.base.model}); give that model's directory with --base"
        )
    if out.exists() and not (out / CERTIFICATE_NAME).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"--out {out} holds something that is no earlier merge; give another directory")
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        left = _merge_shards(read_deltas(adapter_dir), base_dir, temporary, dtype)
        if left:
            raise MergeError(
                f"the base has no weight for {len(left)} of the adapter's modules: {', '.join(sorted(left)[:3])}"
            )
        _copy_rest(adapter_dir, base_dir, temporary, dtype)
        certificate = certify(temporary)
        if certificate.passed:
            shutil.rmtree(out, ignore_errors=True)
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return certificate


def _merge_shards(deltas: Deltas, base_dir: Path, out: Path, dtype: torch.dtype | None) -> set[str]:
    """Returns the adapter's weight names that no shard holds."""
    left = set(deltas.a_RI)
    for shard in sorted(base_dir.glob("*.safetensors")):
        merged: dict[str, torch.Tensor] = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                weight = file.get_tensor(name)
                if name in left:
                    weight = _add(name, weight, deltas).to(weight.dtype)
                    left.discard(name)
                merged[name] = weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight
        save_file(merged, out / shard.name, metadata={"format": "pt"})
    return left


def _add(name: str, weight_OI: torch.Tensor, deltas: Deltas) -> torch.Tensor:
    delta = deltas.delta_OI(name)
    if delta.shape != weight_OI.shape:
        raise MergeError(f"{name}: the adapter's update is {tuple(delta.shape)}, the weight {tuple(weight_OI.shape)}")
    return weight_OI.float() + delta


def _copy_rest(adapter_dir: Path, base_dir: Path, out: Path, dtype: torch.dtype | None) -> None:
    for name in _COPIED:
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, out / name)
    for path in adapter_dir.iterdir():  # tokenizer and template as they were trained
        if path.suffix in {".json", ".jinja", ".model", ".txt"} and path.name not in {ADAPTER_CONFIG, "manifest.json"}:
            shutil.copyfile(path, out / path.name)
    if dtype is not None:
        config: dict[str, Any] = json.loads((out / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
