"""The cache grows without losing what it holds, and never over its budget."""

from __future__ import annotations

import pytest
import torch

from serving.engine.kv_cache import CacheShape, KvCache

SHAPE = CacheShape(layers=2, kv_heads=3, head_dim=4)
TOKEN_BYTES = SHAPE.token_bytes(torch.float32)


def make_cache(budget_tokens: int, max_rows: int = 8, max_length: int = 2048) -> KvCache:
    return KvCache(SHAPE, torch.float32, torch.device("cpu"), max_rows, max_length, budget_tokens * TOKEN_BYTES)


def write_random(cache: KvCache, slots: list[int], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, len(slots), 3, 4)
    for layer in range(SHAPE.layers):
        cache.write(layer, cache.places(torch.tensor(slots), torch.tensor(positions)), keys, values)
    return keys, values


def test_a_token_is_stored_at_its_slot_and_position():
    cache = make_cache(100_000)
    assert cache.reserve(4, 100)
    keys, values = write_random(cache, [0, 3, 3], [7, 0, 99])
    for layer in range(SHAPE.layers):
        for token, (slot, position) in enumerate([(0, 7), (3, 0), (3, 99)]):
            assert torch.equal(cache.keys[layer][slot, :, position], keys[token])
            assert torch.equal(cache.values[layer][slot, :, position], values[token])


def test_growing_keeps_the_content():
    cache = make_cache(100_000)
    keys, _ = write_random(cache, [0, 0], [0, 200])
    assert cache.reserve(5, 700)
    assert cache.rows >= 5
    assert cache.length >= 700
    assert torch.equal(cache.keys[1][0, :, [0, 200]].transpose(0, 1), keys)


def test_a_full_budget_refuses_and_changes_nothing():
    cache = make_cache(2048)
    assert cache.reserve(4, 500)
    before = (cache.rows, cache.length)
    assert not cache.reserve(5, 500)
    assert (cache.rows, cache.length) == before
    assert cache.rows * cache.length <= 2048


def test_rows_become_length_where_both_do_not_fit():
    cache = make_cache(2048)
    assert cache.reserve(8, 256)
    assert cache.reserve(1, 2048), "one row of the whole context always fits"
    assert cache.reserve(8, 256)


def test_growth_is_geometric():
    cache = make_cache(100_000)
    sizes = set()
    for length in range(1, 2049):
        assert cache.reserve(1, length)
        sizes.add(cache.length)
    assert len(sizes) <= 4


def test_moving_copies_a_row():
    cache = make_cache(100_000)
    assert cache.reserve(3, 10)
    keys, _ = write_random(cache, [2, 2], [0, 1])
    cache.move(2, 0, 2)
    assert torch.equal(cache.keys[0][0, :, :2].transpose(0, 1), keys)


def test_a_budget_under_one_row_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match="lower context_length to 2000"):
        make_cache(2000)


def test_a_tight_budget_is_not_copied_for_every_token():
    cache = make_cache(3000)
    sizes = []
    for length in range(1, 1001):
        assert cache.reserve(3, length)
        sizes.append((cache.rows, cache.length))
    assert len(set(sizes)) <= 4
    assert sizes[-1] == (3, 1000)
    assert not cache.reserve(3, 1001)


def test_what_a_cache_gives_up_it_no_longer_uses():
    cache = make_cache(4096)
    assert cache.reserve(8, 512)
    keys, _ = write_random(cache, [0, 1], [0, 99])
    assert cache.give_up(2000 * TOKEN_BYTES)
    assert cache.reserve(2, 100)
    assert cache.rows * cache.length <= 2096
    assert torch.equal(cache.keys[1][0, :, 0], keys[0])
    assert torch.equal(cache.keys[1][1, :, 99], keys[1])
    assert not cache.give_up(100 * TOKEN_BYTES), "a row of the whole context must still fit"
    assert cache.reserve(1, 2048)
    assert cache.give_up(-2000 * TOKEN_BYTES)
    assert cache.reserve(2, 2048)
