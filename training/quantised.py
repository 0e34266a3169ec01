"""What bitsandbytes quantises: NF4 weights, made dense again, and the optimizer with 8-bit state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# A frozen weight or its codes, their scales, and the scales' own scales, code and offset
Stored = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Nf4:
    """How a 4-bit matrix is read. Its block scales are 8-bit codes themselves where `code` is given (nested)."""

    blocksize: int
    shape: tuple[int, int]  # [O, I]
    dtype: torch.dtype  # of the arithmetic


def parts_of(weight: Any) -> tuple[Stored, Nf4 | None]:
    """Returns a frozen weight as the plain tensors that `dense` takes, and how they are read; None: as it stands."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return (weight.detach(), None, None, None, None), None
    how = Nf4(state.blocksize, tuple(state.shape), state.dtype)
    if not state.nested:
        return (weight.detach(), state.absmax, None, None, None), how
    second = state.state2
    return (weight.detach(), state.absmax, second.absmax, second.code, state.offset), how


def dense(
    stored: torch.Tensor,
    scales: torch.Tensor | None,
    nested_scales: torch.Tensor | None,
    code: torch.Tensor | None,
    offset: torch.Tensor | None,
    how: Nf4 | None,
) -> torch.Tensor:
    """Returns the matrix [O, I] in the dtype of the arithmetic. By bitsandbytes' operators, which can be compiled.

    Who quantised the weight has imported bitsandbytes, and with it they are there.
    """
    if how is None or scales is None:
        return stored
    if nested_scales is not None and code is not None and offset is not None:
        scales = torch.ops.bitsandbytes.dequantize_blockwise(scales, nested_scales, code, 256, torch.float32) + offset
    matrix: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        stored.view(-1, 1), scales, how.blocksize, "nf4", how.shape, how.dtype
    )
    return matrix


def make_dense(model: torch.nn.Module) -> None:
    """Replaces a model's quantised layers by plain ones with the same numbers, one after the other."""
    quantised = [
        name for name, module in model.named_modules() if hasattr(getattr(module, "weight", None), "quant_state")
    ]
    for name in quantised:
        layer: Any = model.get_submodule(name)
        frozen, how = parts_of(layer.weight)
        matrix_OI = dense(*frozen, how)
        outputs, inputs = matrix_OI.shape
        plain = torch.nn.Linear(inputs, outputs, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = torch.nn.Parameter(matrix_OI, requires_grad=False), layer.bias
        model.set_submodule(name, plain)


def nf4_round_trip(weight_OI: torch.Tensor) -> torch.Tensor:
    """Returns a weight as NF4 training sees it: quantised with double quantisation and dense again, in its dtype."""
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(
        weight_OI.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    matrix: torch.Tensor = bitsandbytes.functional.dequantize_4bit(packed, state)
    return matrix


def paged_adamw_8bit(
    parameters: list[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Its state moves to host memory when the GPU's is short; needs a CUDA device."""
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW8bit(
        parameters, lr=learning_rate, weight_decay=weight_decay
    )
    return optimizer
