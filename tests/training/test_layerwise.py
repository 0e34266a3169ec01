"""A model that passes through memory block by block says what it says whole, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from training import attention
from training.artifact import read_manifest
from training.batch import join_rows
from training.chat import TrainExample
from training.ground import Ground, Onto, ground_of, quantised_names
from training.layerwise import open_layerwise
from training.model import load_base
from training.readable import Pass, Whole
from training.reading import load_adapted

CPU = torch.device("cpu")
PACKS = [
    join_rows([TrainExample(tuple(range(start, start + length)), (-100,) * length) for start, length in rows])
    for rows in (((5, 30), (60, 9)), ((90, 17),))
]
PASSES = [Pass(PACKS[0]), Pass(PACKS[1], adapter=False), Pass(PACKS[1])]


def check_equal(layerwise: Any, whole: Any, passes: list[Pass] = PASSES) -> None:
    found, expected = layerwise.hidden(passes), whole.hidden(passes)
    assert len(found) == len(passes)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)
    assert torch.equal(layerwise.head(), whole.head())
    assert (layerwise.dtype, layerwise.nf4, layerwise.device) == (whole.dtype, whole.nf4, whole.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_adapter_say_what_they_say_whole(tiny_base: Path, tiny_adapters: dict[str, Path], dtype: torch.dtype):
    adapter = tiny_adapters["starter"]
    whole = load_adapted(adapter, tiny_base, read_manifest(adapter), Onto.PLAIN, dtype, CPU)
    ground = Ground(tiny_base, frozenset(), dtype)
    check_equal(open_layerwise(ground, dtype, CPU, adapter_dir=adapter), whole)


@pytest.mark.parametrize(("trained_in", "error"), [("float32", 0.0), ("bfloat16", 0.05)])
def test_an_nf4_base_says_what_the_quantised_layers_do(tiny_base, tiny_adapters, trained_in, error):
    """In bfloat16 peft's quantised layer rounds the update before it is added, and its plain one after."""
    adapter, dtype = tiny_adapters["starter"], getattr(torch, trained_in)
    changes = {"quantisation": "nf4-double", "compute_dtype": trained_in}
    manifest = read_manifest(adapter).model_copy(update=changes)
    whole = load_adapted(adapter, tiny_base, manifest, Onto.DEQUANTISED, dtype, CPU)
    layerwise = open_layerwise(ground_of(tiny_base, manifest, Onto.DEQUANTISED), dtype, CPU, adapter_dir=adapter)
    assert layerwise.nf4
    if not error:
        check_equal(layerwise, whole)
    for left, right in zip(layerwise.hidden(PASSES), whole.hidden(PASSES), strict=True):
        assert (left - right).float().square().mean().sqrt() <= error * right.float().square().mean().sqrt()


@pytest.mark.parametrize("nf4", [False, True])
def test_dora_says_what_it_says_whole(tiny_base: Path, tmp_path: Path, nf4: bool):
    torch.manual_seed(3)
    attention.register()
    model = peft.get_peft_model(
        load_base(tiny_base, "nf4" if nf4 else "none", torch.float32, CPU),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path)
    ground = Ground(tiny_base, quantised_names(tiny_base) if nf4 else frozenset(), torch.float32)
    check_equal(open_layerwise(ground, torch.float32, CPU, adapter_dir=tmp_path), Whole(model))


def test_weights_are_rounded_anew_as_they_are_whole(tiny_base: Path):
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in (1, 0)]
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.bfloat16, attn_implementation=attention.NAME
    ).eval()
    whole, layerwise = Whole(model), open_layerwise(Ground(tiny_base, frozenset(), torch.bfloat16), torch.bfloat16, CPU)
    before = layerwise.hidden([Pass(PACKS[0])])
    for each in (whole, layerwise):
        each.round_anew(names)
    check_equal(layerwise, whole, [Pass(PACKS[0])])
    assert not torch.equal(layerwise.hidden([Pass(PACKS[0])])[0], before[0])


def test_one_block_is_in_memory_at_a_time_and_none_after(tiny_base: Path):
    layerwise = open_layerwise(Ground(tiny_base, frozenset(), torch.float32), torch.float32, CPU)
    held: list[int] = []

    def held_numbers() -> int:
        return sum(parameter.untyped_storage().nbytes() // 4 for parameter in layerwise.model.parameters())

    hollow = held_numbers()
    blocks = layerwise.model.get_decoder().layers
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: held.append(held_numbers()))
    layerwise.hidden([Pass(PACKS[0]), Pass(PACKS[1])])
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    embedding = layerwise.model.get_input_embeddings().weight.numel()
    assert len(held) == 3 * 2 * len(blocks)  # noted, run, and passed by, each with two packs
    assert max(held) - hollow <= max(*sizes, embedding + 64)
    assert held[2 * len(blocks)] - hollow == pytest.approx(sizes[0], abs=20)
    assert held_numbers() == hollow


def test_a_head_that_is_tied_to_the_embedding_is_found(tiny_base: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    layerwise = open_layerwise(Ground(tmp_path, frozenset(), torch.float32), torch.float32, CPU)
    assert torch.equal(layerwise.head(), model.get_input_embeddings().weight)


def test_progress_is_told_with_the_time_left(tiny_base: Path, capsys: pytest.CaptureFixture[str]):
    ground = Ground(tiny_base, frozenset(), torch.float32)
    open_layerwise(ground, torch.float32, CPU, label="merged").hidden(PASSES[:1])
    assert capsys.readouterr().err.splitlines() == [
        "merged: block 1 of 2, ETA 0:00",
        "merged: block 2 of 2, ETA 0:00",
    ]
    open_layerwise(ground, torch.float32, CPU).hidden(PASSES[:1])
    assert capsys.readouterr().err == ""
