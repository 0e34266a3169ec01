"""The readable model: whatever gives the hidden states of packs, and the one that is whole in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import peft
import torch

from training.batch import Pack
from training.model import PackLoss

# T tokens of a pack, D hidden size, V vocabulary


@dataclass(frozen=True, slots=True)
class Pass:
    """One pack through a model, with its adapter or, of a peft model, without."""

    pack: Pack
    adapter: bool = True


class Readable(Protocol):
    """A model, plain or with an adapter."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        ...

    @property
    def nf4(self) -> bool:
        """Whether its base weights went through NF4."""
        ...

    def hidden(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """Returns the last hidden states of each pass, [T, D]."""
        ...

    def head(self) -> torch.Tensor:
        """Returns the output head, [V, D], which outlives the model; neither LoRA nor NF4 touches it."""
        ...

    def round_anew(self, names: Iterable[str]) -> None:
        """Moves these 16-bit weights as `rounded_anew` does, from now on."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A plain or peft model that is in memory."""

    model: Any

    @property
    def base(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        return self.model.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype  # type: ignore[no-any-return]

    @property
    def nf4(self) -> bool:
        return bool(getattr(self.base, "is_loaded_in_4bit", False))

    @torch.no_grad()
    def hidden(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        network, found = PackLoss(self.model), []
        for each in passes:
            with nullcontext() if each.adapter else self.model.disable_adapter():
                found.append(network.hidden(each.pack.to(self.device)))
        return found

    def head(self) -> torch.Tensor:
        return self.base.get_output_embeddings().weight.detach()  # type: ignore[no-any-return]

    @torch.no_grad()
    def round_anew(self, names: Iterable[str]) -> None:
        parameters = dict(self.model.named_parameters())
        for seed, name in enumerate(sorted(names)):
            parameters[name].copy_(rounded_anew(parameters[name], seed))


def rounded_anew(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns a 16-bit weight as another rounding would leave it: one step up or down, each with probability 1/24.

    That has the variance of a rounding error, step^2 / 12, and keeps the dtype.
    """
    random = torch.Generator(weight.device).manual_seed(seed)
    draws = torch.rand(weight.shape, generator=random, device=weight.device)
    steps = (draws < 1 / 24).short() - (draws > 23 / 24).short()
    # One more in the bits of a 16-bit float is one step away from 0; a step from 0 itself has no such form.
    return (weight.detach().view(torch.int16) + steps * (weight != 0)).view(weight.dtype)
