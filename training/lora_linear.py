"""The LoRA linear layer as one autograd node: base product, dropout and update, forward and backward."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from training.quantised import Nf4, dense, parts_of

# T tokens, I input features, O output features, R rank


def fuse_lora(model: Any) -> int:
    """Replaces the forward pass of each plain LoRA linear layer; returns how many there are.

    peft's own takes about thirty small kernels and three saved copies of the input a layer; this saves the input and
    the dropout's mask. In fp32 the numbers are peft's; in 16 bits the update is added before it is rounded, not after.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    """Whether base and update are plain products; DoRA and other variants keep peft's own forward pass."""
    base = layer.get_base_layer()
    one_adapter = len(layer.lora_A) == 1 and not layer.lora_variant and not any(layer.lora_bias.values())
    return one_adapter and isinstance(base, torch.nn.Linear)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    base = self.base_layer
    if self.disable_adapters or self.merged:
        return base(x)  # type: ignore[no-any-return]
    (name,) = self.lora_A.keys()
    dropout = self.lora_dropout[name]
    probability = dropout.p if self.training and isinstance(dropout, torch.nn.Dropout) else 0.0
    frozen, how = parts_of(base.weight)
    out: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, *frozen, how, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], probability
    )
    return out


@torch.library.custom_op("graft::add_product_", mutates_args=("out",))
def _add_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """Adds scale * left right to `out`. The compiler's own addmm would copy `out` first, a large matrix."""
    out.addmm_(left, right, alpha=scale)


class _LoraLinear(torch.autograd.Function):
    """y = x W' + bias + scaling * dropout(x) A' B'; W stays frozen, and is made dense again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stored: torch.Tensor,
        scales: torch.Tensor | None,
        nested_scales: torch.Tensor | None,
        code: torch.Tensor | None,
        offset: torch.Tensor | None,
        how: Nf4 | None,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        dense_OI = dense(stored, scales, nested_scales, code, offset, how)
        dtype = dense_OI.dtype
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        a_RI, b_OR = a_RI.to(dtype), b_OR.to(dtype)
        out_TO = x_TI @ dense_OI.T if bias_O is None else torch.addmm(bias_O.to(dtype), x_TI, dense_OI.T)
        dropped_TI, kept_TI = torch.native_dropout(x_TI, dropout, True) if dropout else (x_TI, None)
        low_TR = dropped_TI @ a_RI.T
        _add_product_(out_TO, low_TR, b_OR.T, scaling)
        ctx.save_for_backward(x_TI, kept_TI, low_TR, a_RI, b_OR, stored, scales, nested_scales, code, offset)
        ctx.how, ctx.scaling, ctx.dropout, ctx.x_dtype = how, scaling, dropout, x.dtype
        return out_TO.view(*x.shape[:-1], out_TO.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, kept_TI, low_TR, a_RI, b_OR, stored, scales, nested_scales, code, offset = ctx.saved_tensors
        grad_TO = grad_out.reshape(-1, grad_out.shape[-1]).to(x_TI.dtype)
        grad_low_TR = (grad_TO @ b_OR) * ctx.scaling
        grad_b_OR = (grad_TO.T @ low_TR).float() * ctx.scaling
        dropped_TI = x_TI if kept_TI is None else _masked(x_TI, kept_TI, ctx.dropout)
        grad_a_RI = (grad_low_TR.T @ dropped_TI).float()
        grad_TI = grad_TO @ dense(stored, scales, nested_scales, code, offset, ctx.how)
        update_TI = grad_low_TR @ a_RI
        grad_TI = grad_TI + (update_TI if kept_TI is None else _masked(update_TI, kept_TI, ctx.dropout))
        grad_x = grad_TI.view(*grad_out.shape[:-1], grad_TI.shape[-1]).to(ctx.x_dtype)
        return grad_x, None, None, None, None, None, None, None, grad_a_RI, grad_b_OR, None, None


def _masked(values: torch.Tensor, kept: torch.Tensor, dropout: float) -> torch.Tensor:
    """What dropout's forward pass does to `values`, by its mask."""
    out: torch.Tensor = torch.ops.aten.native_dropout_backward(values, kept, 1 / (1 - dropout))
    return out
