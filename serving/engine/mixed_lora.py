"""Linear layers that run the base and several adapters over one flattened batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn

from serving.engine.engine import Variant, WeightFormat
from serving.engine.product import arithmetic_dtype, is_nf4, make_product

# T token, I input feature, O output feature, R rank
THIN_ROWS = 32  # waking a second thread for an update of fewer costs more than it computes: 13 against 30 ms a step
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one parent, fed the same tensor


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One layer's update: y += (x A^T) B^T, the scaling inside B."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Update:
    """A group's factors as the products want them; views made here once are calls saved in every step."""

    a_IR: torch.Tensor
    b_RO: torch.Tensor


@dataclass(frozen=True, slots=True)
class AdapterSlice:
    """Neighbouring tokens of a batch that one adapter answers."""

    variant: Variant
    first: int
    end: int


@dataclass(slots=True)
class ActiveSlices:
    """The slices of the forward pass that runs now; its owner sets them, all layers of one model read them."""

    slices: tuple[AdapterSlice, ...] = ()


class LinearGroup:
    """Linear layers that read the same input, as one product; and the adapters' updates of them.

    One call less a layer, and above all one pair of small products an adapter instead of one for each layer.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], active: ActiveSlices, weights: WeightFormat = WeightFormat.PLAIN
    ) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.in_features = linears[0].in_features
        self._dtype, self._device = arithmetic_dtype(linears[0]), linears[0].weight.device
        product = make_product(linears, weights)
        self._product, self.size_bytes = product.run, product.size_bytes
        self._active = active
        self._source: torch.Tensor | None = None  # the input whose outputs wait for their members
        self._outputs: dict[int, torch.Tensor] = {}
        self._updates: dict[Variant, _Update] = {}

    def attach(self, variant: Variant, factors: Mapping[int, LoraFactors]) -> None:
        """Adds an adapter's updates by member; one pair of matrices answers for all of them."""
        rank = sum(update.a_RI.shape[0] for update in factors.values())
        b_OR = torch.zeros(sum(self.sizes), rank)
        column = 0
        for index, update in sorted(factors.items()):
            row, width = sum(self.sizes[:index]), update.a_RI.shape[0]
            b_OR[row : row + self.sizes[index], column : column + width] = update.b_OR
            column += width
        a_RI = torch.cat([update.a_RI for _, update in sorted(factors.items())])
        self._updates[variant] = _Update(self._placed(a_RI).t(), self._placed(b_OR.t()))

    def detach(self, variant: Variant) -> None:
        self._updates.pop(variant, None)

    def output(self, inputs: torch.Tensor, member: int) -> torch.Tensor:
        """Returns one member's output; the first member asked for an input computes all of them."""
        if len(self.sizes) == 1:
            return self._forward(inputs)
        if self._source is not inputs or member not in self._outputs:
            self._source = inputs
            self._outputs = dict(enumerate(self._forward(inputs).split_with_sizes(self.sizes, -1)))
        output = self._outputs.pop(member)
        if not self._outputs:
            self._source = None
        return output

    def _forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self._product(inputs)
        if self._active.slices:
            x_TI, y_TO = inputs.view(-1, self.in_features), output.view(-1, output.shape[-1])
            with one_thread(thin=x_TI.is_cpu and len(x_TI) <= THIN_ROWS):
                self._add_updates(x_TI, y_TO)
        return output

    def _add_updates(self, x_TI: torch.Tensor, y_TO: torch.Tensor) -> None:
        for part in self._active.slices:
            update = self._updates.get(part.variant)
            if update is None:
                continue
            whole = part.first == 0 and part.end == len(x_TI)
            part_x_TI, part_y_TO = (x_TI, y_TO) if whole else (x_TI[part.first : part.end], y_TO[part.first : part.end])
            part_y_TO.addmm_(part_x_TI.mm(update.a_IR), update.b_RO)

    def _placed(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.to(device=self._device, dtype=self._dtype).contiguous()


@contextmanager
def one_thread(*, thin: bool) -> Iterator[None]:
    """Has what runs inside use one thread, where it is too little work for several."""
    threads = torch.get_num_threads()
    if not thin or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class GroupedLinear(nn.Module):
    """Stands in a model where a member of a LinearGroup stood."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.group, self.member = group, member

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.group.output(inputs, self.member)


def group_linears(
    model: nn.Module, active: ActiveSlices, weights: WeightFormat = WeightFormat.PLAIN
) -> dict[str, GroupedLinear]:
    """Replaces every linear layer inside `model`, in place; returns the replacements by their path in the model."""
    replaced: dict[str, GroupedLinear] = {}
    for path, parent in list(model.named_modules()):
        linears = {name: child for name, child in parent.named_children() if _is_linear(child)}
        for names in _grouped_names(linears):
            group = LinearGroup([linears[name] for name in names], active, weights)
            for index, name in enumerate(names):
                member = GroupedLinear(group, index)
                setattr(parent, name, member)
                replaced[f"{path}.{name}".removeprefix(".")] = member
    return replaced


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear or is_nf4(module)


def _grouped_names(linears: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
    groups = [names for names in SHARED_INPUTS if all(name in linears for name in names)]
    grouped = {name for names in groups for name in names}
    return [*groups, *((name,) for name in linears if name not in grouped)]
