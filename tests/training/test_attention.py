"""Packed attention: rows of a pack never see each other."""

from __future__ import annotations

import pytest
import torch

from training.attention import packed_attention


def qkv(tokens: int, seed: int = 0, heads: int = 4, kv_heads: int = 2):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, kv_heads, kv_heads)
    return [torch.randn(1, count, tokens, 8, generator=generator, requires_grad=True) for count in shapes]


def test_a_pack_equals_its_rows_alone():
    query, key, value = qkv(11)
    packed, _ = packed_attention(torch.nn.Module(), query, key, value, None, row_lengths=(4, 7))
    rows = [
        packed_attention(torch.nn.Module(), *(tensor[:, :, part] for tensor in (query, key, value)), None)[0]
        for part in (slice(0, 4), slice(4, 11))
    ]
    torch.testing.assert_close(packed, torch.cat(rows, 1))


def test_another_row_changes_exactly_nothing():
    query, key, value = qkv(11)
    packed, _ = packed_attention(torch.nn.Module(), query, key, value, None, row_lengths=(4, 7))
    packed[:, 4:].sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad[:, :, :4].abs().max() == 0
        assert tensor.grad[:, :, 4:].abs().max() > 0


def test_later_tokens_of_a_row_change_nothing_before_them():
    query, key, value = qkv(6)
    packed, _ = packed_attention(torch.nn.Module(), query, key, value, None, row_lengths=(6,))
    packed[:, :3].sum().backward()
    assert value.grad[:, :, 3:].abs().max() == 0


def test_batches_and_masks_are_refused():
    query, key, value = qkv(4)
    with pytest.raises(ValueError, match="one sequence"):
        packed_attention(torch.nn.Module(), query, key, value, torch.ones(1, 1, 4, 4))
