"""Crash-safe checkpoints: written aside, hashed, marked whole, renamed; a torn one is never resumed."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from training.artifact import sha256_file
from training.disk import sync, write_whole
from training.errors import TrainingError

_MARKER = "complete.json"
_WEIGHTS = "adapter.safetensors"
_OPTIMIZER = "optimizer.pt"
_SHOWN = 5  # fields of a changed recipe that are named


class CheckpointError(TrainingError):
    """A checkpoint that must not be resumed; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to go on after `step` optimizer steps, as if it had never stopped.

    `inputs` names what the run was made of (recipe as TOML; hashes of data, rendered rows and base); resuming with
    others is refused. Random draws need no state: each step seeds its own.
    """

    step: int
    inputs: Mapping[str, str]
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]  # of fp16's loss; empty for other dtypes
    micro_batch_tokens: int | None = None  # where memory ran out: dropout's draws follow the packs


def save(directory: Path, checkpoint: Checkpoint, keep: int, best_step: int | None = None) -> Path:
    """Writes `directory/step-N` and drops all but the newest `keep` and the best.

    Raises OSError where the disk refuses; nothing is dropped then, and the unfinished one gives back its space.
    """
    final = _path(directory, checkpoint.step)
    temporary = _aside(final, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, checkpoint)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():  # torn, or the run would have gone on from it
        _remove(final)
    temporary.rename(final)
    sync(directory)
    sync(directory.parent)
    kept = _kept(directory, final, keep)
    kept += [_path(directory, best_step)] if best_step is not None else []
    for old in set(_all(directory)) - set(kept):
        _remove(old)
    return final


def discard(directory: Path) -> None:
    """Removes all checkpoints, whole or torn, and nothing else; the newest last, so that a crash leaves it whole."""
    for path in reversed(_all(directory)):
        _remove(path)
    discard_unfinished(directory)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def discard_unfinished(directory: Path) -> None:
    """Removes what a killed process left: a checkpoint half written, or half removed."""
    for path in directory.glob(".step-*"):
        shutil.rmtree(path)


def is_empty(directory: Path) -> bool:
    """Whether there is no checkpoint, not even a torn one."""
    return not _all(directory)


def newest(directory: Path) -> Path | None:
    """Returns the newest checkpoint whose files all match their hashes, or None."""
    return next((path for path in _all(directory) if _fault(path) is None), None)


def torn(directory: Path) -> list[str]:
    """Returns what is wrong with each checkpoint newer than the newest whole one, newest first."""
    found = []
    for path in _all(directory):
        fault = _fault(path)
        if fault is None:
            break
        found.append(f"{path}/{fault}")
    return found


def of_step(directory: Path, step: int) -> Path:
    """Returns that step's checkpoint. Raises CheckpointError where it is not there whole."""
    path = _path(directory, step)
    if fault := _fault(path):
        raise CheckpointError(
            f"{path}, the best by validation, is gone or torn ({fault}); restore it, or train again with --fresh"
        )
    return path


def load(path: Path, inputs: Mapping[str, str]) -> Checkpoint:
    """Raises CheckpointError where the checkpoint was made from other `inputs`, naming each that differs."""
    marker = json.loads((path / _MARKER).read_text())
    then: Mapping[str, str] = marker["inputs"]
    changed = [_difference(name, then.get(name, ""), now) for name, now in inputs.items() if then.get(name) != now]
    if changed:
        raise CheckpointError(
            f"{path} was made with another {', another '.join(changed)}; resume with what it was made with, "
            "or discard it with --fresh"
        )
    optimizer = torch.load(path / _OPTIMIZER, weights_only=True, map_location="cpu")
    weights = safetensors.torch.load_file(path / _WEIGHTS)
    budget = marker.get("micro_batch_tokens")
    return Checkpoint(marker["step"], then, weights, optimizer, marker["scaler"], budget)


def _write(directory: Path, checkpoint: Checkpoint) -> None:
    """Hashes what was meant to be written, not what arrived: a write that the disk garbles is found out."""
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in checkpoint.weights.items()}
    optimizer = io.BytesIO()
    torch.save(checkpoint.optimizer, optimizer)
    files = {_WEIGHTS: safetensors.torch.save(weights), _OPTIMIZER: optimizer.getvalue()}
    for name, content in files.items():
        write_whole(directory / name, content)
    marker = {
        "step": checkpoint.step,
        "inputs": dict(checkpoint.inputs),
        "scaler": dict(checkpoint.scaler),
        "micro_batch_tokens": checkpoint.micro_batch_tokens,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    write_whole(directory / _MARKER, json.dumps(marker, indent=2).encode())
    sync(directory)


def _difference(name: str, then: str, now: str) -> str:
    """Returns the input's name and how it changed: field by field for a recipe, else by the first of its hash."""
    if name != "recipe" or "\n" not in then:
        return f"{name} ({then[:12] or 'unknown'} then, {now[:12]} now)"
    old, new = dict(_fields(then)), dict(_fields(now))
    fields = [
        f"{field} = {old.get(field, 'unset')} then, {new.get(field, 'unset')} now"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ]
    more = f"; and {len(fields) - _SHOWN} more" if len(fields) > _SHOWN else ""
    return f"recipe ({'; '.join(fields[:_SHOWN])}{more})"


def _fields(recipe: str) -> Iterator[tuple[str, str]]:
    for section, table in tomllib.loads(recipe).items():
        yield from ((f"{section}.{key}", json.dumps(value, ensure_ascii=False)) for key, value in table.items())


def _kept(directory: Path, saved: Path, keep: int) -> list[Path]:
    """Later steps than the saved one are torn, or it would have resumed from them."""
    return [path for path in _all(directory) if _order(path) <= _order(saved)][:keep]


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def _aside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _remove(path: Path) -> None:
    """Renamed first: a crash midway leaves nothing that looks like a checkpoint."""
    aside = _aside(path, "old")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def _all(directory: Path) -> list[Path]:
    """Newest first."""
    return sorted(directory.glob("step-*"), key=_order, reverse=True)


def _order(path: Path) -> tuple[int, str]:
    return len(path.name), path.name  # a millionth step has a longer name


def _fault(path: Path) -> str | None:
    """Returns which file of a checkpoint is not as it was written, or None."""
    try:
        files: dict[str, str] = json.loads((path / _MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_MARKER}: missing, or torn"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name}: missing"
        if sha256_file(path / name) != digest:
            return f"{name}: not as it was written (sha256 differs)"
    return None
