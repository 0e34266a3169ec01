"""A base's shape, read from headers alone, is that of the loaded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from transformers import AutoModelForCausalLM

from training.base import BaseError, BaseFiles
from training.base_shape import BaseShape, read_header, read_shape


def shape_of(directory: Path) -> BaseShape:
    return read_shape(BaseFiles(directory, "tiny", None))


def test_the_counts_are_those_of_the_loaded_model(tiny_base: Path):
    shape, model = shape_of(tiny_base), AutoModelForCausalLM.from_pretrained(tiny_base)
    matrices = sum(linear.inputs * linear.outputs for linear in shape.linears)
    assert matrices + shape.other == model.num_parameters()
    assert len(shape.linears) == shape.layers * 7
    assert (shape.layers, shape.hidden, shape.query, shape.key_value, shape.mlp) == (2, 64, 64, 32, 128)
    assert shape.vocabulary == model.config.vocab_size
    assert {linear.name for linear in shape.linears} >= {"q_proj", "down_proj"}
    down = next(linear for linear in shape.linears if linear.name == "down_proj")
    assert (down.inputs, down.outputs) == (128, 64)
    assert shape.file_bytes == 4 * model.num_parameters()


def test_no_weight_is_read(tiny_base: Path, tmp_path: Path):
    """The files may end after their headers."""
    source = tiny_base / "model.safetensors"
    with source.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    (tmp_path / "model.safetensors").write_bytes(source.read_bytes()[: 8 + size])
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    assert shape_of(tmp_path) == shape_of(tiny_base)


def test_shards_and_one_file_are_the_same_shape(tiny_base: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert set(shape_of(tmp_path).linears) == set(shape_of(tiny_base).linears)
    assert shape_of(tmp_path).other == shape_of(tiny_base).other
    assert "__metadata__" in read_header(next(tmp_path.glob("*.safetensors")))


def test_a_tied_head_counts_once(tiny_base: Path, tmp_path: Path):
    untied = shape_of(tiny_base)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert untied.other - shape_of(tmp_path).other == untied.vocabulary * untied.hidden


def test_a_mixture_of_experts_is_refused(tiny_base: Path, tmp_path: Path):
    config = json.loads((tiny_base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 8}))
    with pytest.raises(BaseError, match="num_local_experts = 8"):
        shape_of(tmp_path)


def test_the_hubs_headers_give_the_same_shape(tiny_base: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    header = read_header(tiny_base / "model.safetensors")
    tensors = {
        name: TensorInfo(dtype=entry["dtype"], shape=entry["shape"], data_offsets=tuple(entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }
    file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    names = dict.fromkeys(tensors, "model.safetensors")
    found = SafetensorsRepoMetadata(None, False, names, {"model.safetensors": file})
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda repo_id, revision: found)
    assert shape_of(tmp_path) == shape_of(tiny_base)


def test_a_directory_without_weights_and_unknown_to_the_hub_is_named(tiny_base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    with pytest.raises(BaseError, match="and the hub did not give their headers"):
        shape_of(tmp_path)
