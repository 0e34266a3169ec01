"""The sharded model: base and adapter spread over all processes, as `accelerate launch --use_fsdp` asks (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.config import TrainConfig
from training.errors import TrainingError
from training.hollow import Hollow

_USE = "ACCELERATE_USE_FSDP"
_ONLY = {  # of the launcher's settings: what is allowed, and the remedy for the rest
    "FSDP_VERSION": (("2",), "version 1 cannot hold fp32 LoRA weights beside a 16-bit base; give --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "offloading is not supported; leave it out, or take more devices"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "set run.gradient_checkpointing = 'on' in the recipe instead"),
    "FSDP_AUTO_WRAP_POLICY": (("transformer_based_wrap",), "the model is sharded by decoder block; leave it out"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "the model is sharded by decoder block; leave it out"),
    "FSDP_IGNORED_MODULES": ((), "all modules are sharded; leave it out"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "false"), "give true (less memory) or false (less traffic)"),
}


class ShardingError(TrainingError):
    """A way to shard that cannot be followed; names the setting, its value and the remedy."""


@dataclass(frozen=True, slots=True)
class Sharding:
    reshard_after_forward: bool  # gather a block's weights again for its backward pass


def read_sharding(settings: Mapping[str, str]) -> Sharding | None:
    """Returns how the launcher's environment wants the model sharded; None: not at all. Raises ShardingError.

    Its other FSDP settings are of version 1 alone, or change no number: prefetching, state dict types, loading.
    """
    if settings.get(_USE, "false").lower() != "true":
        return None
    for name, (allowed, remedy) in _ONLY.items():
        value = settings.get(name, "1" if name == "FSDP_VERSION" else None)
        if value is not None and value.lower() not in allowed:
            raise ShardingError(f"{name} = {value!r}: {remedy}")
    return Sharding(settings.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true")


def require_shardable(config: TrainConfig, processes: int, dtype: torch.dtype) -> None:
    """Raises ShardingError for a recipe that needs a whole model in each process; `dtype`: of its arithmetic here."""
    refused = {
        "optim.optimizer = 'paged_adamw_8bit'": config.optim.optimizer == "paged_adamw_8bit",
        "lora.dora = true": config.lora.dora,
        "run.sample_prompts": bool(config.run.sample_prompts),
        "run.compile = 'on'": config.run.compile == "on",
        "run.cuda_graphs = 'on'": config.run.cuda_graphs == "on",
        "model.keep_dense = 'on'": config.model.keep_dense == "on",
        f"model.dtype = {config.model.dtype!r} (float16 here)": dtype == torch.float16,  # its scaler is one process's
    }
    if found := [name for name, present in refused.items() if present]:
        raise ShardingError(f"{', '.join(found)}: not supported by FSDP; change it, or launch without --use_fsdp")
    if processes < 2:
        raise ShardingError("one process has nothing to shard with; launch without --use_fsdp, or with more processes")


def shard(
    network: Any, hollow: Hollow, dtype: torch.dtype, device: torch.device, processes: int, how: Sharding
) -> None:
    """Fills a hollow PackLoss and spreads it over all processes, in place: each block is gathered when it runs, the
    rest once.

    A process reads and quantises a block, keeps its part of it, and goes on to the next: none ever holds the whole.
    The blocks go by peft's own forward pass: gathered weights carry no quantisation state, which bitsandbytes'
    layers then take from themselves.
    """

    def weight_of(name: str) -> torch.Tensor:
        return hollow.read(name).to(device=device, dtype=dtype)

    mesh = init_device_mesh(device.type, (processes,))
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.__dict__.pop("forward", None)
    causal = network.model.get_base_model()
    blocks = causal.get_decoder().layers
    ends = [name for name in hollow.slots.keys() - hollow.names_in(blocks) if name in hollow.files]
    for block in blocks:
        hollow.fill(hollow.names_in(block), weight_of)
        fully_shard(block, mesh=mesh, reshard_after_forward=how.reshard_after_forward)
    hollow.fill(ends, weight_of)
    if hollow.name_of(causal.get_output_embeddings()) not in ends:  # it has no weight of its own
        causal.get_output_embeddings().weight = causal.get_input_embeddings().weight
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with all its shards; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """Returns the trained parameters by name, whole; every process must ask for them."""
    return {name: whole(weight.detach()) for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def set_trained_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises ShardingError where the names are not those of the model's trained parameters."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if trained.keys() != weights.keys():
        raise ShardingError(f"weights of {len(weights)} parameters do not fit a model that trains {len(trained)}")
    for name, weight in trained.items():
        weight.copy_(_like(weights[name], weight))


def whole_optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state dict with whole tensors; every process must ask for it."""
    return {
        **state,
        "state": {
            index: {name: whole(value) if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
            for index, entry in state["state"].items()
        },
    }


def sharded_optimizer(state: Mapping[str, Any], parameters: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Returns the inverse of `whole_optimizer` for these parameters, sharded or not."""
    return {
        **state,
        "state": {
            index: {name: _like(value, parameters[index]) for name, value in entry.items()}
            for index, entry in state["state"].items()
        },
    }


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """Spreads a tensor as the parameter of its shape is; others, such as a count of steps, stay whole."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
