"""A safetensors file, written one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

NUMBER_BYTES = {
    code: size
    for size, codes in ((8, "F64 I64"), (4, "F32 I32"), (2, "F16 BF16 I16"), (1, "F8_E4M3 F8_E5M2 I8 U8 BOOL"))
    for code in codes.split()
}
CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class Kind:
    """A tensor's dtype, in safetensors' letters, and its shape."""

    code: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * NUMBER_BYTES[self.code]


def write_tensors(path: Path, kinds: Mapping[str, Kind], tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Writes each of `kinds` as `tensor_of` gives it, holding one at a time. Raises OSError that names `path`."""
    order = sorted(kinds, key=lambda name: (-NUMBER_BYTES[kinds[name].code], name))  # each is aligned to its numbers
    try:
        with path.open("wb") as file:
            file.write(_header(order, kinds))
            for name in order:
                numbers = tensor_of(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                if len(numbers) != kinds[name].size_bytes:
                    raise ValueError(f"{name}: {len(numbers)} bytes, not {kinds[name].size_bytes}")
                file.write(numbers.numpy().data)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write names none
        raise


def _header(order: list[str], kinds: Mapping[str, Kind]) -> bytes:
    """Returns the length in 8 bytes, little endian, then JSON, padded so that the numbers start at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        kind = kinds[name]
        header[name] = {"dtype": kind.code, "shape": kind.shape, "data_offsets": (at, at + kind.size_bytes)}
        at += kind.size_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
