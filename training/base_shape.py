"""The shape of a base model: how many numbers its weights hold, from config.json and the weight files' headers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.base import BaseError, BaseFiles
from training.tensor_file import NUMBER_BYTES

_BLOCK = re.compile(r"(?:^|\.)layers\.\d+\.(?:.*\.)?(?P<name>[^.]+)\.weight$")
_INDEX = "model.safetensors.index.json"
_MIXTURE = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a block, such as `q_proj`."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class BaseShape:
    """Sizes of a decoder of equal blocks. Widths are in numbers a token."""

    layers: int
    hidden: int
    query: int  # heads x head size
    key_value: int
    mlp: int
    vocabulary: int
    linears: tuple[Linear, ...]  # of all blocks: what NF4 and LoRA apply to
    other: int  # numbers in embeddings, head, norms and biases
    file_bytes: int


def read_shape(base: BaseFiles) -> BaseShape:
    """Reads no weight. Raises BaseError where the headers cannot be had, and for a mixture of experts."""
    config = json.loads((base.directory / "config.json").read_text(encoding="utf-8"))
    if experts := next((key for key in _MIXTURE if config.get(key)), None):
        raise BaseError(f"{base.model_id}: {experts} = {config[experts]}: a mixture of experts is not planned for")
    tensors = _headers(base)
    tied = config.get("tie_word_embeddings", False)
    kept = {name: shape for name, (_, shape) in tensors.items() if not (tied and name == "lm_head.weight")}
    linears = {
        name: Linear(match["name"], shape[1], shape[0])
        for name, shape in kept.items()
        if len(shape) == 2 and (match := _BLOCK.search(name))
    }
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return BaseShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        query=head * config["num_attention_heads"],
        key_value=head * config.get("num_key_value_heads", config["num_attention_heads"]),
        mlp=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        linears=tuple(linears.values()),
        other=sum(math.prod(shape) for name, shape in kept.items() if name not in linears),
        file_bytes=sum(NUMBER_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in tensors.values()),
    )


def _headers(base: BaseFiles) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Returns each stored tensor's dtype and shape, from local files where all of them are there, else from the hub."""
    files = _local_files(base.directory)
    if not files:
        return _hub_headers(base)
    return {
        name: (entry["dtype"], tuple(entry["shape"]))
        for path in files
        for name, entry in read_header(path).items()
        if name != "__metadata__"
    }


def _local_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.is_file():
        return sorted(directory.glob("*.safetensors"))
    files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return files if all(path.is_file() for path in files) else []


def read_header(path: Path) -> dict[str, Any]:
    """Returns a safetensors file's header: its length in 8 bytes, little endian, then JSON."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header


def _hub_headers(base: BaseFiles) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        found = get_safetensors_metadata(base.model_id, revision=base.revision)
    except (HfHubHTTPError, NotASafetensorsRepoError, OSError, ValueError) as error:
        raise BaseError(
            f"{base.directory}: no *.safetensors, and the hub did not give their headers ({error}); "
            "check the network, or give model.id a directory with config.json and *.safetensors"
        ) from error
    return {
        name: (str(tensor.dtype), tuple(tensor.shape))
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
