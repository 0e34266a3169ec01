"""Adapters of a tiny base, changed in one way each, and registries opened on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from serving.engine.engine import Engine
from serving.engine.fake_engine import FakeEngine
from serving.registry.boot import open_registry
from serving.registry.registry import Registry
from training.artifact import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROBES_NAME, hash_files, read_manifest, write_manifest

Tensors = dict[str, torch.Tensor]


def vary(adapter: Path, directory: Path, seed: int) -> Path:
    """Copies an adapter with other weights; its probes, which would not fit, are left out."""
    shutil.copytree(adapter, directory, ignore=shutil.ignore_patterns(PROBES_NAME))
    scale = 1 + seed / 1000
    change_tensors(directory, lambda tensors: {name: tensor * scale for name, tensor in tensors.items()})
    return directory


def change_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = directory / ADAPTER_WEIGHTS
    save_file(change(load_file(path)), path)
    sign(directory)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    sign(directory)


def change_manifest(directory: Path, section: str, **changes: Any) -> None:
    """Changes one section of the manifest; "" is the top."""
    manifest = read_manifest(directory)
    if section:
        changes = {section: getattr(manifest, section).model_copy(update=changes)}
    write_manifest(directory, manifest.model_copy(update=changes))


def sign(directory: Path) -> None:
    """Writes the manifest anew over the files as they are: a whole adapter, whatever is in it."""
    change_manifest(directory, "", files=hash_files(directory))


def digest_of(directory: Path) -> str:
    return read_manifest(directory).digest


def fake_engine() -> FakeEngine:
    return FakeEngine(context_length=512, vocabulary_size=400)


@asynccontextmanager
async def opened(base: Path, engine: Engine | None = None, **options: Any) -> AsyncIterator[Registry]:
    """Yields a started registry; its engine is stopped, as the app does, before it closes."""
    engine = engine or fake_engine()
    registry = open_registry("base", base, **options)
    try:
        await engine.start()
        await registry.start(engine)
        yield registry
    finally:
        await engine.stop()
        await registry.close()
