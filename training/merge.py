"""Merges an adapter into its base, shard by shard in fp32, into a model directory that stands alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from training.artifact import (
    ADAPTER_CONFIG,
    CERTIFICATE_NAME,
    PROBES_NAME,
    MergeCertificate,
    fingerprint_base,
    verify_adapter,
)
from training.deltas import Deltas, MergeError, read_deltas
from training.ground import Ground, Onto, ground_of, shards

_COPIED = ("config.json", "generation_config.json", "model.safetensors.index.json")
_OF_THE_ADAPTER = {ADAPTER_CONFIG, PROBES_NAME, "manifest.json"}


def merge(
    adapter_dir: Path,
    base_dir: Path,
    out: Path,
    dtype: torch.dtype | None,
    certify: Callable[[Path], MergeCertificate],
    onto: Onto = Onto.PLAIN,
) -> MergeCertificate:
    """Writes the merged model in `dtype`, or each weight's own, and has it certified; `out` changes only if it passed.

    Holds one shard in memory at a time. Raises ArtifactError or MergeError where adapter and base do not fit, and where
    `out` holds anything but an earlier merge.
    """
    refuse_to_replace(out)
    temporary = out.with_name(out.name + ".tmp")
    try:
        write_merged(adapter_dir, base_dir, temporary, dtype, onto)
        certificate = certify(temporary)
        if certificate.passed:
            put_in_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return certificate


def refuse_to_replace(out: Path) -> None:
    """Raises MergeError where `out` holds anything but an earlier merge."""
    if out.exists() and not (out / CERTIFICATE_NAME).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"--out {out} holds something that is no earlier merge; give another directory")


def put_in_place(merged: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    merged.rename(out)


def write_merged(adapter_dir: Path, base_dir: Path, out: Path, dtype: torch.dtype | None, onto: Onto) -> None:
    """Writes the merged model into `out`, anew. Raises ArtifactError or MergeError as `merge` does."""
    manifest = verify_adapter(adapter_dir)
    if fingerprint_base(base_dir) != manifest.base.fingerprint:
        raise MergeError(
            f"{base_dir} is not the base of {adapter_dir}: its fingerprint is not "
            f"{manifest.base.fingerprint[:12]} ({manifest.base.model}); give that model's directory with --base"
        )
    ground = ground_of(base_dir, manifest, onto)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    left = _merge_shards(read_deltas(adapter_dir), ground, out, dtype)
    if left:
        raise MergeError(
            f"the base has no weight for {len(left)} of the adapter's modules: {', '.join(sorted(left)[:3])}"
        )
    _copy_rest(adapter_dir, base_dir, out, dtype)


def _merge_shards(deltas: Deltas, ground: Ground, out: Path, dtype: torch.dtype | None) -> set[str]:
    """Returns the adapter's weight names that no shard holds."""
    left = set(deltas.a_RI)
    for shard in shards(ground.base_dir):
        merged: dict[str, torch.Tensor] = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                merged[name] = _merged(name, file.get_tensor(name), deltas, ground, dtype)
                left.discard(name)
        save_file(merged, out / shard.name, metadata={"format": "pt"})
    return left


def _merged(name: str, stored: torch.Tensor, deltas: Deltas, ground: Ground, dtype: torch.dtype | None) -> torch.Tensor:
    if not stored.is_floating_point():
        return stored
    weight = ground.weight(name, stored)
    if name in deltas.a_RI:
        weight = deltas.applied(name, weight)
    return weight.to(dtype or stored.dtype)


def _copy_rest(adapter_dir: Path, base_dir: Path, out: Path, dtype: torch.dtype | None) -> None:
    for name in _COPIED:
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, out / name)
    for path in adapter_dir.iterdir():  # tokenizer and template as they were trained
        if path.suffix in {".json", ".jinja", ".model", ".txt"} and path.name not in _OF_THE_ADAPTER:
            shutil.copyfile(path, out / path.name)
    if dtype is not None:
        config: dict[str, Any] = json.loads((out / "config.json").read_text())
        config.pop("torch_dtype", None)  # the older name of the same, which some engines read first
        config["dtype"] = str(dtype).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
