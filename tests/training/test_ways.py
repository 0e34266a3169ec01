"""The ways of a run are what the recipe says, or what pays on its device; what does not go together is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.recipes import small_config
from training import attention
from training.config import TrainConfig
from training.ways import Ways, WaysError, choose_ways

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LONG = 1000  # optimizer steps


def recipe(tmp_path: Path, **sections: Any) -> TrainConfig:
    return small_config(tmp_path, tmp_path, **sections)


@pytest.fixture
def roomy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the choice asks of a device, answered for an 80 GB Ampere or later; nothing is computed on it."""
    monkeypatch.setattr(attention, "takes_bounds", lambda dtype, device: dtype != torch.float32 and device == CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), {"total_memory": 80 * 2**30}))


def test_a_cpu_takes_the_plain_way(tmp_path):
    config = recipe(tmp_path, model={"quantisation": "nf4"})
    assert choose_ways(config, torch.float32, CPU, steps=LONG) == Ways(False, False, False, False)


@pytest.mark.usefixtures("roomy_gpu")
def test_a_long_run_on_a_roomy_gpu_is_compiled_replayed_and_dense(tmp_path):
    config = recipe(tmp_path, model={"quantisation": "nf4"})
    assert choose_ways(config, torch.bfloat16, CUDA, steps=LONG) == Ways(False, True, True, True)
    assert choose_ways(config, torch.bfloat16, CUDA, steps=LONG - 1) == Ways(False, False, False, False)
    assert choose_ways(config, torch.float32, CUDA, steps=LONG) == Ways(False, False, False, False)


@pytest.mark.usefixtures("roomy_gpu")
def test_plain_weights_are_dense_already(tmp_path):
    config = recipe(tmp_path, model={"quantisation": "none"})
    assert not choose_ways(config, torch.bfloat16, CUDA, steps=LONG).dense


@pytest.mark.usefixtures("roomy_gpu")
def test_several_processes_compile_without_graphs_and_a_sharded_model_does_neither(tmp_path):
    config = recipe(tmp_path, model={"quantisation": "nf4"})
    assert choose_ways(config, torch.bfloat16, CUDA, steps=LONG, processes=2) == Ways(False, True, False, True)
    sharded = choose_ways(config, torch.bfloat16, CUDA, steps=LONG, processes=2, sharded=True)
    assert sharded == Ways(False, False, False, False)


@pytest.mark.usefixtures("roomy_gpu")
def test_recomputed_activations_keep_the_memory_small(tmp_path):
    config = recipe(tmp_path, model={"quantisation": "nf4"}, run={"gradient_checkpointing": "on"})
    assert choose_ways(config, torch.bfloat16, CUDA, steps=LONG) == Ways(True, True, False, False)


@pytest.mark.usefixtures("roomy_gpu")
def test_the_recipe_overrules_each(tmp_path):
    off = recipe(tmp_path, model={"keep_dense": "off"}, run={"compile": "off", "cuda_graphs": "off"})
    assert choose_ways(off, torch.bfloat16, CUDA, steps=LONG) == Ways(False, False, False, False)
    on = recipe(tmp_path, model={"keep_dense": "on", "quantisation": "nf4"}, run={"cuda_graphs": "on"})
    assert choose_ways(on, torch.bfloat16, CUDA, steps=1) == Ways(False, False, True, True)


@pytest.mark.usefixtures("roomy_gpu")
@pytest.mark.parametrize(
    ("sections", "processes", "named"),
    [
        ({"run": {"gradient_checkpointing": "on"}}, 1, "run.gradient_checkpointing"),
        ({"optim": {"neftune_alpha": 5.0}}, 1, "optim.neftune_alpha = 5.0"),
        ({"lora": {"dora": True}}, 1, "lora.dora = true"),
        ({}, 2, "2 processes"),
    ],
)
def test_graphs_that_cannot_be_are_refused_where_asked_for(tmp_path, sections, processes, named):
    sections = {**sections, "run": {**sections.get("run", {}), "cuda_graphs": "on"}}
    with pytest.raises(WaysError, match=rf"run\.cuda_graphs = 'on' does not go with {named}"):
        choose_ways(recipe(tmp_path, **sections), torch.bfloat16, CUDA, steps=LONG, processes=processes)


def test_graphs_on_a_cpu_are_refused(tmp_path):
    with pytest.raises(WaysError, match=r"does not go with the arithmetic here, torch\.float32 on cpu"):
        choose_ways(recipe(tmp_path, run={"cuda_graphs": "on"}), torch.float32, CPU, steps=LONG)
