"""Packed attention: every row of a pack attends causally to itself, and to nothing else."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

# T tokens of a pack, H query heads, K key-value heads, D head size
NAME = "graft_packed"


def register() -> None:
    """Makes `attn_implementation=NAME` known to transformers; models then take `row_lengths` as a keyword."""
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    row_lengths: tuple[int, ...] | None = None,
    row_bounds: torch.Tensor | None = None,
    longest_row: int | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Returns the attention output [1, T, H, D], with transformers' attention signature.

    The rows are given as `rows_of` returns them; without, the whole sequence is one row. Attention dropout is not
    applied: no supported model trains with it. Raises ValueError for a batch of several sequences or with a mask,
    which packs never are.
    """
    if query_1HTD.shape[0] != 1 or attention_mask is not None or dropout:
        raise ValueError("packed attention takes one sequence, no mask and no attention dropout")
    if row_bounds is not None and longest_row is not None:
        return _varlen(query_1HTD, key_1KTD, value_1KTD, scaling, row_bounds, longest_row), None
    lengths = row_lengths or (query_1HTD.shape[2],)
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(
            query_1HTD.split(lengths, 2), key_1KTD.split(lengths, 2), value_1KTD.split(lengths, 2), strict=True
        )
    ]
    return torch.cat(outputs, 2).transpose(1, 2), None


def rows_of(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Returns a pack's rows as keywords of `packed_attention`, made once for all layers.

    Where the kernel takes them they are bounds on the device, int32 [rows + 1], so that a compiled layer serves every
    number of rows.
    """
    if not takes_bounds(dtype, device):
        return {"row_lengths": lengths}
    bounds = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))
    return {"row_bounds": bounds.to(device), "longest_row": max(lengths)}


def takes_bounds(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's own flash attention for rows of unequal length runs: Ampere and later, 16-bit."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    scaling: float | None,
    bounds: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query_1HTD, key_1KTD, value_1KTD))  # [T, heads, D]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    out = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), bounds, bounds, longest, longest,
        scale=scaling, window_size=(-1, 0),
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out.unsqueeze(0)
