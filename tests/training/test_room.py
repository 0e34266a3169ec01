"""The room for a model: its need is what it really takes, and a limit that cannot be kept is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training import room as module
from training.ground import quantised_names
from training.model import load_base
from training.room import FREE_MEMORY, Need, Room, RoomError, free_bytes, need_of, room_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("quantisation", "dtype"), [("none", torch.float32), ("none", torch.bfloat16), ("nf4", torch.float32)]
)
def test_a_whole_models_need_is_its_weights_and_a_head_in_fp32(tiny_base: Path, quantisation: str, dtype: torch.dtype):
    model = load_base(tiny_base, quantisation, dtype, CPU)
    held = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    head = model.get_output_embeddings().weight
    quantised = quantised_names(tiny_base) if quantisation == "nf4" else frozenset()
    need = need_of(tiny_base, dtype, quantised)
    assert need.whole == pytest.approx(held + head.numel() * (4 + head.element_size()), rel=0.02)


def test_block_by_block_a_deep_model_needs_far_less(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    need = need_of(tmp_path, torch.float32)
    assert need.layerwise < need.whole / 5


def test_a_model_is_whole_where_it_fits_and_refused_where_no_block_does():
    need = Need(whole=100, layerwise=10)
    assert Room(100).holds(need, CPU)
    assert not Room(99).holds(need, CPU)
    assert not Room(10).holds(need, CPU)
    with pytest.raises(
        RoomError, match=r"--max-memory-gib 8\.38e-09 is too little: .* takes 9\.31e-09 GiB at the least"
    ):
        Room(9).holds(need, CPU)


def test_without_a_limit_most_of_the_free_memory_counts(monkeypatch: pytest.MonkeyPatch):
    for free, whole in ((1000, True), (100, False), (None, True)):
        monkeypatch.setattr(module, "free_bytes", lambda _, free=free: free)
        assert FREE_MEMORY.holds(Need(whole=100, layerwise=90), CPU) is whole
    monkeypatch.setattr(module, "free_bytes", lambda _: 10)
    assert not FREE_MEMORY.holds(Need(whole=100, layerwise=90), CPU), "tried, since pages of files can be given back"


@pytest.mark.parametrize("gib", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_amount_of_memory_is_refused(gib: float):
    with pytest.raises(RoomError, match="give a number above 0"):
        room_of(gib)


def test_an_amount_is_in_gib():
    assert room_of(None) is FREE_MEMORY
    assert room_of(0.5) == Room(2**29)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 4096_000),
        ({"memory.max": "max\n", "memory.stat": "anon 5\n"}, 4096_000),
        ({"memory.max": "2000\n", "memory.stat": "anon 500\nfile 900\n"}, 1500),
        ({"memory/memory.limit_in_bytes": "3000\n", "memory/memory.stat": "cache 7\ntotal_rss 1000\n"}, 2000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.stat": "total_rss 1\n"}, 4096_000),
    ],
)
def test_free_memory_is_the_systems_or_the_containers(tmp_path, monkeypatch, files, free):
    write(tmp_path, {"meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n", **files})
    monkeypatch.setattr(module, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(module, "_CGROUPS", tmp_path)
    assert free_bytes(CPU) == free


def test_this_machine_tells_what_is_free():
    free = free_bytes(CPU)
    assert free is None or free > 2**20
