"""The layerwise model: it passes through memory one decoder block at a time, where the whole of it does not fit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch

from training.batch import Pack
from training.ground import Ground
from training.hollow import Hollow, hollow_base
from training.log import clock
from training.model import PackLoss, refuse_unsupported
from training.readable import Pass, rounded_anew

# T tokens of a pack, D hidden size, V vocabulary
_LINES = 4  # of progress, each time through the blocks


@dataclass(slots=True)
class _State:
    """A pack on its way through the blocks, and what its decoder passes to each of them beside the hidden states."""

    hidden_1TD: torch.Tensor
    beside: list[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(slots=True)
class Layerwise:
    """A plain or peft model whose base weights are hollow until they are needed; its adapter is in memory."""

    model: Any
    hollow: Hollow
    ground: Ground
    dtype: torch.dtype
    device: torch.device
    label: str | None  # before the lines of progress; None: no lines
    seeds: dict[str, int] = field(default_factory=dict)  # of the weights that are rounded anew

    @property
    def nf4(self) -> bool:
        return bool(self.ground.quantised)

    @torch.no_grad()
    def hidden(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """Reads each weight once. The blocks are the model's own, and so is what comes before and after them."""
        blocks, begun = list(self._causal().get_decoder().layers), time.monotonic()
        packs = [each.pack.to(self.device) for each in passes]
        with self._loaded(self._ends(embedding=True)):
            states = [self._enter(pack, blocks) for pack in packs]
        for number, block in enumerate(blocks):
            with self._loaded(self.hollow.names_in(block)):
                for adapter in (True, False):
                    mine = [state for state, each in zip(states, passes, strict=True) if each.adapter is adapter]
                    self._through(block, number, mine, adapter=adapter)
            self._tell(number + 1, len(blocks), begun)
        with self._loaded(self._ends(embedding=False)):
            return [self._leave(pack, state, blocks) for pack, state in zip(packs, states, strict=True)]

    def head(self) -> torch.Tensor:
        causal = self._causal()
        own, tied = map(self.hollow.name_of, (causal.get_output_embeddings(), causal.get_input_embeddings()))
        return self._weight(own if own in self.hollow.files else tied)

    def round_anew(self, names: Iterable[str]) -> None:
        self.seeds = {name: seed for seed, name in enumerate(sorted(names))}

    def _causal(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model

    def _enter(self, pack: Pack, blocks: Sequence[Any]) -> _State:
        """Runs the decoder with blocks that only note what they are given."""
        inputs: list[torch.Tensor] = []
        beside: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden_1TD: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            inputs.append(hidden_1TD)
            beside.append((rest, named))
            return hidden_1TD

        with _instead(blocks, note):
            PackLoss(self.model).hidden(pack)
        return _State(inputs[0], beside)

    def _through(self, block: Any, number: int, states: Sequence[_State], *, adapter: bool) -> None:
        if not states:
            return
        with nullcontext() if adapter else self.model.disable_adapter():
            for state in states:
                rest, named = state.beside[number]
                state.hidden_1TD = block(state.hidden_1TD, *rest, **named)

    def _leave(self, pack: Pack, state: _State, blocks: Sequence[Any]) -> torch.Tensor:
        """Runs the decoder with blocks that hand on what came out of the last."""
        with _instead(blocks, lambda *_, **__: state.hidden_1TD):
            return PackLoss(self.model).hidden(pack)

    def _ends(self, *, embedding: bool) -> list[str]:
        """Returns the names outside of the blocks, without the head, and the embedding only where it is asked for."""
        causal = self._causal()
        left_out = [causal.get_decoder().layers, causal.get_output_embeddings()]
        left_out += [] if embedding else [causal.get_input_embeddings()]
        unwanted = {name for module in left_out for name in self.hollow.names_in(module)}
        return [name for name in self.hollow.slots if name not in unwanted]

    def _weight(self, name: str) -> torch.Tensor:
        weight = self.ground.weight(name, self.hollow.read(name).to(self.device)).to(self.dtype)
        return rounded_anew(weight, self.seeds[name]) if name in self.seeds else weight

    @contextmanager
    def _loaded(self, names: Sequence[str]) -> Iterator[None]:
        slots = [self.hollow.slots[name] for name in names]
        before = [module._parameters[leaf] for module, leaf in slots]
        try:
            self.hollow.fill(names, self._weight)
            yield
        finally:
            for (module, leaf), parameter in zip(slots, before, strict=True):
                module._parameters[leaf] = parameter

    def _tell(self, done: int, total: int, begun: float) -> None:
        if self.label is None or done * _LINES // total == (done - 1) * _LINES // total:
            return
        eta_s = (time.monotonic() - begun) / done * (total - done)
        print(f"{self.label}: block {done} of {total}, ETA {clock(eta_s)}", file=sys.stderr, flush=True)


def open_layerwise(
    ground: Ground,
    dtype: torch.dtype,
    device: torch.device,
    *,
    adapter_dir: Path | None = None,
    label: str | None = None,
) -> Layerwise:
    """Returns the model of `ground`, with peft's adapter where one is given; reads no base weight.

    NF4 weights are made dense in `dtype`, so a peft layer on them is that of plain weights: in fp32 its numbers are
    those of the quantised layer, in 16 bits one rounding a layer less. Raises HollowError.
    """
    hollow = hollow_base(ground.base_dir, dtype, device)
    refuse_unsupported(hollow.model.config)
    model = hollow.model
    if adapter_dir is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter_dir)).eval()
    return Layerwise(model, hollow, ground, dtype, device, label)


@contextmanager
def _instead(blocks: Iterable[Any], forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    blocks = list(blocks)
    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
