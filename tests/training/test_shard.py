"""Sharding: what the launcher says is followed or refused by name, and whole tensors pass through unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.training.recipes import small_config
from training.batch import join_rows
from training.chat import TrainExample
from training.config import LoraConfig
from training.hollow import Hollow, hollow_base
from training.model import PackLoss, add_lora, load_base, nf4_config
from training.run import assemble
from training.shard import (
    Sharding,
    ShardingError,
    read_sharding,
    require_shardable,
    set_trained_weights,
    shard,
    sharded_optimizer,
    trained_weights,
    whole_optimizer,
)
from training.step import optimizer_step

# What `accelerate launch --use_fsdp --fsdp_version 2` puts into the environment.
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


def test_the_launchers_settings_are_followed():
    assert read_sharding({}) is None
    assert read_sharding({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}) is None
    assert read_sharding(LAUNCHED) == Sharding(reshard_after_forward=True)
    assert read_sharding({**LAUNCHED, "FSDP_RESHARD_AFTER_FORWARD": "false"}) == Sharding(reshard_after_forward=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"FSDP_VERSION": "1"}, "give --fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "offloading is not supported"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "run.gradient_checkpointing = 'on'"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "FSDP_AUTO_WRAP_POLICY = 'SIZE_BASED_WRAP'"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaMLP"}, "by decoder block"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(changes: dict[str, str], told: str):
    with pytest.raises(ShardingError, match=next(iter(changes))) as refusal:
        read_sharding({**LAUNCHED, **changes})
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"lora": {"dora": True}}, "lora.dora"),
        ({"run": {"sample_prompts": ["hi"]}}, "run.sample_prompts"),
        ({"optim": {"optimizer": "paged_adamw_8bit"}}, "paged_adamw_8bit"),
        ({"run": {"cuda_graphs": "on"}}, "run.cuda_graphs"),
        ({"model": {"keep_dense": "on"}}, "model.keep_dense"),
    ],
)
def test_a_recipe_that_needs_a_whole_model_is_refused(tmp_path: Path, sections: dict[str, Any], told: str):
    with pytest.raises(ShardingError, match=told):
        require_shardable(small_config(tmp_path, tmp_path, **sections), processes=2, dtype=torch.float32)


@pytest.mark.parametrize("dtype", ["float16", "auto"])
def test_float16_is_refused_whether_it_was_asked_for_or_found_here(tmp_path: Path, dtype: str):
    config = small_config(tmp_path, tmp_path, model={"dtype": dtype})
    with pytest.raises(ShardingError, match=rf"model.dtype = '{dtype}' \(float16 here\)"):
        require_shardable(config, processes=2, dtype=torch.float16)
    require_shardable(config, processes=2, dtype=torch.bfloat16)


def test_one_process_is_refused(tmp_path: Path):
    require_shardable(small_config(tmp_path, tmp_path), processes=2, dtype=torch.float32)
    with pytest.raises(ShardingError, match="one process"):
        require_shardable(small_config(tmp_path, tmp_path), processes=1, dtype=torch.float32)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("nf4", [False, True])
def test_each_block_is_spread_before_the_next_is_read(tiny_base: Path, alone: None, nf4: bool):
    cpu, dtype, read = torch.device("cpu"), torch.float32, []
    hollow = hollow_base(tiny_base, dtype, cpu, nf4_config(dtype, storage=dtype) if nf4 else None)
    network = PackLoss(add_lora(hollow.model, LoraConfig(rank=4), seed=0))
    blocks = network.model.get_base_model().get_decoder().layers

    class Watched(Hollow):
        def fill(self, names, weight_of):
            spread = [all(isinstance(weight, DTensor) for weight in block.parameters()) for block in blocks]
            read.append((spread, len(list(names))))
            super().fill(names, weight_of)

    shard(
        network, Watched(hollow.model, hollow.slots, hollow.files), dtype, cpu, 1, Sharding(reshard_after_forward=True)
    )
    assert read == [([False, False], 9), ([True, False], 9), ([True, True], 3)]  # then embedding, norm and head
    assert all(isinstance(weight, DTensor) for weight in network.parameters())
    whole = PackLoss(add_lora(load_base(tiny_base, "nf4" if nf4 else "none", dtype, cpu), LoraConfig(rank=4), seed=0))
    ids = torch.arange(5, 25)
    pack = join_rows([TrainExample(tuple(ids.tolist()), tuple(ids.tolist()))])
    with torch.no_grad():
        assert float(network.eval()(pack)) == pytest.approx(float(whole.eval()(pack)), rel=1e-6)


def test_weights_and_optimizer_state_return_as_they_were(tiny_base: Path, tmp_path: Path):
    run = assemble(small_config(tiny_base, tmp_path), tmp_path, tmp_path)
    optimizer_step(run, 0)
    weights, state = trained_weights(run.peft_model), whole_optimizer(run.optimizer.state_dict())
    other = assemble(small_config(tiny_base, tmp_path, run={"seed": 7}), tmp_path, tmp_path)
    set_trained_weights(other.peft_model, weights)
    parameters = [weight for weight in other.peft_model.parameters() if weight.requires_grad]
    other.optimizer.load_state_dict(sharded_optimizer(state, parameters))
    again = trained_weights(other.peft_model)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    for index, entry in other.optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[name], state["state"][index][name]) for name in entry)
    with pytest.raises(ShardingError, match="do not fit"):
        set_trained_weights(run.peft_model, {})
