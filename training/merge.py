"""Merges an adapter into its base, weight by weight in fp32, into a model directory that stands alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from training.artifact import (
    ADAPTER_CONFIG,
    CERTIFICATE_NAME,
    PROBES_NAME,
    MergeCertificate,
    fingerprint_base,
    verify_adapter,
)
from training.base_shape import read_header
from training.deltas import Deltas, MergeError, read_deltas
from training.disk import DiskError, disk_failures, free_space
from training.ground import Ground, Onto, ground_of, read_weight, shards
from training.tensor_file import CODES, NUMBER_BYTES, Kind, write_tensors

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

    Holds one weight in memory at a time. Raises ArtifactError or MergeError where adapter and base do not fit, and
    where `out` holds anything but an earlier merge; DiskError where the disk has no space, at the start or midway.
    """
    refuse_to_replace(out)
    temporary = out.with_name(out.name + ".tmp")
    with on_disk(out, merged_bytes(base_dir, dtype)):
        try:
            write_merged(adapter_dir, base_dir, temporary, dtype, onto)
            certificate = certify(temporary)
            if certificate.passed:
                put_in_place(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return certificate


def merged_bytes(base_dir: Path, dtype: torch.dtype | None) -> int:
    """Returns what the weights of a merge take on disk, in `dtype` or in each one's own; reads headers alone."""
    return sum(kind.size_bytes for path in shards(base_dir) for kind in _kinds(path, dtype).values())


def _kinds(shard: Path, dtype: torch.dtype | None) -> dict[str, Kind]:
    """Returns what a shard's weights become: those of floats in `dtype`, if one is given. Raises MergeError."""
    found = {}
    for name, entry in read_header(shard).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in NUMBER_BYTES:
            raise MergeError(
                f"{shard}: {name} is in {entry['dtype']}, which cannot be merged; give a base in 16 or 32 bits"
            )
        code = CODES[dtype] if dtype is not None and "F" in entry["dtype"] else entry["dtype"]
        found[name] = Kind(code, tuple(entry["shape"]))
    return found


@contextmanager
def on_disk(out: Path, needed: int) -> Iterator[None]:
    """Raises DiskError where `needed` bytes cannot be written beside `out`, or a write there is refused."""
    free = free_space(out.parent)
    remedy = (
        f"The merge needs {needed:,} bytes ({needed / 2**30:.2f} GiB) beside {out}, which stays as it is; {free:,} "
        f"({free / 2**30:.2f} GiB) were free at its start. Free some space, give --out on another disk, or a --dtype "
        "of 16 bits where it is float32"
    )
    if free < needed:
        raise DiskError(f"cannot write {out}: no space left on its disk. {remedy}")
    with disk_failures(out.parent, remedy):
        yield


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
        kinds = _kinds(shard, dtype)
        merge_one = partial(_merged_from, shard, deltas=deltas, ground=ground, dtype=dtype)
        write_tensors(out / shard.name, kinds, merge_one)
        left -= kinds.keys()
    return left


def _merged_from(shard: Path, name: str, *, deltas: Deltas, ground: Ground, dtype: torch.dtype | None) -> torch.Tensor:
    return _merged(name, read_weight(shard, name), deltas, ground, dtype)


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
