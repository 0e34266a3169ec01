"""Crash-safe checkpoints: written aside, hashed, marked whole, renamed; a torn one is never resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from training.artifact import sha256_file
from training.errors import TrainingError

_MARKER = "complete.json"
_WEIGHTS = "adapter.safetensors"
_OPTIMIZER = "optimizer.pt"


class CheckpointError(TrainingError):
    """A checkpoint that must not be resumed; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to go on after `step` optimizer steps, as if it had never stopped.

    `inputs` names what the run was made of (recipe, data, base); resuming with others is refused. Random draws need
    no state: each step seeds its own.
    """

    step: int
    inputs: Mapping[str, str]
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]  # of fp16's loss; empty for other dtypes
    micro_batch_tokens: int | None = None  # where memory ran out: dropout's draws follow the packs


def save(directory: Path, checkpoint: Checkpoint, keep: int, best_step: int | None = None) -> Path:
    """Writes `directory/step-N` and drops all but the newest `keep` and the best; failing midway drops none."""
    final = _path(directory, checkpoint.step)
    temporary = directory / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous().cpu() for name, tensor in checkpoint.weights.items()}, temporary / _WEIGHTS)
    torch.save(checkpoint.optimizer, temporary / _OPTIMIZER)
    marker = {
        "step": checkpoint.step,
        "inputs": dict(checkpoint.inputs),
        "scaler": dict(checkpoint.scaler),
        "micro_batch_tokens": checkpoint.micro_batch_tokens,
        "files": {name: sha256_file(temporary / name) for name in (_WEIGHTS, _OPTIMIZER)},
    }
    (temporary / _MARKER).write_text(json.dumps(marker, indent=2))
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync(directory)
    kept = _kept(directory, final, keep)
    kept += [_path(directory, best_step)] if best_step is not None else []
    for old in set(_all(directory)) - set(kept):
        shutil.rmtree(old)
    return final


def discard(directory: Path) -> None:
    """Removes all checkpoints, whole or torn, and nothing else."""
    for path in (*directory.glob("step-*"), *directory.glob(".step-*.tmp")):
        shutil.rmtree(path)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def newest(directory: Path) -> Path | None:
    """Returns the newest checkpoint whose files all match their hashes, or None."""
    return next((path for path in _all(directory) if _is_whole(path)), None)


def of_step(directory: Path, step: int) -> Path:
    """Returns that step's checkpoint. Raises CheckpointError where it is not there whole."""
    path = _path(directory, step)
    if not _is_whole(path):
        raise CheckpointError(f"{path}, the best by validation, is gone or torn; train again with --fresh")
    return path


def load(path: Path, inputs: Mapping[str, str]) -> Checkpoint:
    """Raises CheckpointError where the checkpoint was made from other `inputs`, naming each that differs."""
    marker = json.loads((path / _MARKER).read_text())
    changed = [name for name in inputs if marker["inputs"].get(name) != inputs[name]]
    if changed:
        raise CheckpointError(
            f"{path} was made with another {', '.join(changed)}; resume with what it was made with, "
            "or discard it with --fresh"
        )
    optimizer = torch.load(path / _OPTIMIZER, weights_only=True, map_location="cpu")
    weights = load_file(path / _WEIGHTS)
    budget = marker.get("micro_batch_tokens")
    return Checkpoint(marker["step"], marker["inputs"], weights, optimizer, marker["scaler"], budget)


def _kept(directory: Path, saved: Path, keep: int) -> list[Path]:
    """Later steps than the saved one are torn, or it would have resumed from them."""
    return [path for path in _all(directory) if path.name <= saved.name][:keep]


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def _all(directory: Path) -> list[Path]:
    """Newest first."""
    return sorted(directory.glob("step-*"), reverse=True)


def _is_whole(path: Path) -> bool:
    try:
        files: dict[str, str] = json.loads((path / _MARKER).read_text())["files"]
        return all(sha256_file(path / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def sync(path: Path) -> None:
    """Has the disk hold what was written to a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
