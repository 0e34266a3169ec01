"""The hollow model: its base weights have shape, dtype and device but no memory, until they are filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert

from training import attention
from training.errors import TrainingError
from training.ground import read_weight, shard_of


class HollowError(TrainingError):
    """A model whose weights cannot be found one by one; names them."""


@dataclass(frozen=True, slots=True)
class Hollow:
    """`slots` are the module and the attribute of each base weight, by its name in the files."""

    model: Any
    slots: Mapping[str, tuple[torch.nn.Module, str]]
    files: Mapping[str, Path]

    def names_in(self, module: torch.nn.Module) -> list[str]:
        inside = {id(part) for part in module.modules()}
        return [name for name, (owner, _) in self.slots.items() if id(owner) in inside]

    def name_of(self, module: torch.nn.Module) -> str:
        return next(name for name, (owner, leaf) in self.slots.items() if owner is module and leaf == "weight")

    def read(self, name: str) -> torch.Tensor:
        return read_weight(self.files[name], name)

    def fill(self, names: Iterable[str], weight_of: Callable[[str], torch.Tensor]) -> None:
        """Puts weights in; those of a quantised layer are quantised. `weight_of` gives them on the device."""
        for name in names:
            module, leaf = self.slots[name]
            hollow, weight = module._parameters[leaf], weight_of(name)
            # A quantised layer's parameter keeps how it is quantised in its attributes, and is so by `to`.
            module._parameters[leaf] = _like(hollow, weight).to(weight.device)


def hollow_base(
    directory: Path, dtype: torch.dtype, device: torch.device, nf4: BitsAndBytesConfig | None = None
) -> Hollow:
    """Returns the base with packed attention, in NF4 if asked for; reads no weight. Raises HollowError.

    Not on the meta device: peft moves an adapter to where the weights are.
    """
    attention.register()
    config = AutoConfig.from_pretrained(str(directory))
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    if nf4 is not None:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        replace_with_bnb_linear(model, get_keys_to_not_convert(model), nf4)
        model.is_loaded_in_4bit = True  # peft asks
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=dtype, device=device).expand(parameter.shape)
                module._parameters[name] = _like(parameter, zeros)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return _found(model.eval(), directory)


def _like(parameter: Any, data: torch.Tensor) -> Any:
    how = parameter.__dict__ if hasattr(parameter, "quant_type") else {}  # attributes of bitsandbytes' own class
    return type(parameter)(data, **{**how, "requires_grad": False})


def _found(model: Any, directory: Path) -> Hollow:
    slots = {
        f"{path}.{leaf}": (module, leaf)
        for path, module in model.named_modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }
    files, head = shard_of(directory), model.get_output_embeddings()
    missing = [name for name, (module, _) in slots.items() if name not in files and module is not head]
    if missing:
        raise HollowError(
            f"{directory}: its files have no {', '.join(missing[:3])}: {model.config.model_type} is stored under other "
            "names than it is computed with, and must be read whole; take more memory, or one process"
        )
    return Hollow(model, slots, files)
