"""A file that is written tensor by tensor is what safetensors itself reads, and writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.training.test_disk import file_size_limit
from training.tensor_file import CODES, Kind, write_tensors

TENSORS = {
    "wide.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "a.weight": torch.randn(4, 2).bfloat16(),
    "ö.bias": torch.randn(7).half(),
    "transposed": torch.randn(3, 4).T,
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
}


def kinds() -> dict[str, Kind]:
    return {name: Kind(CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_tensors_come_back_as_they_went_in(tmp_path: Path):
    asked = []

    def tensor_of(name: str) -> torch.Tensor:
        asked.append(name)
        return TENSORS[name]

    write_tensors(tmp_path / "x.safetensors", kinds(), tensor_of)
    found = load_file(tmp_path / "x.safetensors")
    assert sorted(asked) == sorted(found) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_bytes_are_safetensors_own(tmp_path: Path):
    same = {name: tensor.float().contiguous() for name, tensor in TENSORS.items()}
    write_tensors(tmp_path / "ours", {name: Kind("F32", tuple(t.shape)) for name, t in same.items()}, same.__getitem__)
    save_file(same, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_of_another_size_than_announced_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"scalar: 2 bytes, not 4"):
        write_tensors(tmp_path / "x", {"scalar": Kind("F32", ())}, lambda _: torch.tensor(1.0).half())


def test_a_refused_write_names_the_file(tmp_path: Path):
    with pytest.raises(OSError, match="File too large") as refusal, file_size_limit(100):
        write_tensors(tmp_path / "x", kinds(), TENSORS.__getitem__)
    assert refusal.value.filename == str(tmp_path / "x")
