"""The product x W^T + b of frozen linear layers, in the number format that their weights are kept in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from serving.engine.engine import WeightFormat

# T token, I input feature, O output feature
PACK_ROWS = 32  # rows that the packed layout is tuned for; measured best from 1 to 256 rows


@dataclass(frozen=True, slots=True)
class Product:
    """`run` maps [..., I] to [..., O]; `size_bytes` is what its weights take."""

    run: Callable[[torch.Tensor], torch.Tensor]
    size_bytes: int


def make_product(linears: Sequence[nn.Linear], weights: WeightFormat = WeightFormat.PLAIN) -> Product:
    """Returns the product of layers that read the same input, their outputs side by side.

    Layers that were loaded in NF4 stay so; `weights` says how others are kept.
    """
    bias_O = _joined_bias(linears)
    if is_nf4(linears[0]):
        return _nf4_product(linears, bias_O)
    weight_OI = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
    make = _fp16_product if weights is WeightFormat.FP16 else _plain_product
    return make(weight_OI.detach(), bias_O)


def is_nf4(linear: nn.Module) -> bool:
    """Whether bitsandbytes holds the layer's weight in 4 bits; told without importing it."""
    return getattr(getattr(linear, "weight", None), "quant_state", None) is not None


def arithmetic_dtype(linear: nn.Linear) -> torch.dtype:
    """Returns the dtype of the layer's inputs and outputs; NF4 codes are bytes."""
    weight: Any = linear.weight
    dtype: torch.dtype = weight.quant_state.dtype if is_nf4(linear) else weight.dtype
    return dtype


def _plain_product(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Product:
    """On a CPU in fp32 the weight is laid out once for oneDNN, exactly the same numbers: 2 to 4 times faster than
    F.linear, which lays it out in every call, for 2 to 16 rows and never slower."""
    packable = weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32
    operators = torch.ops.mkldnn
    if packable and torch.backends.mkldnn.is_available() and hasattr(operators, "_linear_pointwise"):
        packed = operators._reorder_linear_weight(weight_OI, PACK_ROWS)
        return Product(partial(_packed_product, packed, bias_O), weight_OI.nbytes)
    return Product(partial(functional.linear, weight=weight_OI, bias=bias_O), weight_OI.nbytes)


def _packed_product(packed: torch.Tensor, bias_O: torch.Tensor | None, x_TI: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TI, packed, bias_O, "none", [], "")
    return product


def _fp16_product(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Product:
    """FBGEMM's: 16-bit weights, input and sums in fp32. Half the memory to read: 1.3 (32 rows) to 3 times (1) as fast
    as the packed fp32 weight on two AVX2 cores. A sum's last bits depend on the number of rows."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight_OI, bias_O)
    return Product(partial(_fp16_run, packed), weight_OI.numel() * 2)


def _fp16_run(packed: Any, inputs: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(inputs, packed)
    return product


def _nf4_product(linears: Sequence[nn.Linear], bias_O: torch.Tensor | None) -> Product:
    """One matrix of all, where each layer's blocks end with it; else a product for each.

    The block scales are made fp32 once: 0.3 GiB more of a 7B model, exactly the same numbers, and what can be joined.
    """
    weights: list[Any] = [linear.weight for linear in linears]
    states = [weight.quant_state for weight in weights]
    block, features = states[0].blocksize, states[0].shape[1]
    if len(linears) > 1 and any(linear.out_features * features % block for linear in linears):
        parts = [make_product([linear]) for linear in linears]
        return Product(partial(_side_by_side, parts), sum(part.size_bytes for part in parts))
    codes = torch.cat([weight.detach().view(-1) for weight in weights]).view(-1, 1)
    scales = torch.cat([_block_scales(state) for state in states])
    shape = (sum(linear.out_features for linear in linears), features)
    run = partial(_nf4_run, codes, scales, shape, block, bias_O)
    return Product(run, codes.nbytes + scales.nbytes)


def _block_scales(state: Any) -> torch.Tensor:
    scales: torch.Tensor = state.absmax
    if state.nested:
        second = state.state2
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            state.absmax, second.absmax, second.code, second.blocksize, torch.float32
        )
        scales = scales + state.offset
    return scales


def _nf4_run(
    codes: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, int],
    block: int,
    bias_O: torch.Tensor | None,
    inputs: torch.Tensor,
) -> torch.Tensor:
    """bitsandbytes multiplies by the codes themselves for few rows on a GPU, and makes the matrix dense for others."""
    product: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        inputs, codes, shape, scales, block, "nf4", bias=bias_O
    )
    return product


def _side_by_side(parts: Sequence[Product], inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.run(inputs) for part in parts], dim=-1)


def _joined_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    dtype = arithmetic_dtype(linears[0])
    biases = [
        torch.zeros(linear.out_features, dtype=dtype, device=linear.weight.device)
        if linear.bias is None
        else linear.bias.to(dtype)
        for linear in linears
    ]
    return torch.cat(biases).detach()
