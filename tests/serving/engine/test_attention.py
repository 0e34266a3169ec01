"""Attention over slots equals plain attention of each row alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from serving.engine.attention import Span, attend, make_plan, split_runs
from serving.engine.kv_cache import CacheShape, KvCache

KV_HEADS, GROUPS, HEAD_DIM, SCALING = 2, 3, 8, 0.3
LAYER = SimpleNamespace(layer_idx=0)

BATCHES = {
    "decoding rows of one length": [(0, 9, 1), (1, 9, 1), (2, 9, 1)],
    "decoding rows of many lengths": [(0, 3, 1), (1, 40, 1), (2, 0, 1)],
    "decoding rows out of order, with a gap": [(3, 5, 1), (0, 17, 1), (1, 2, 1)],
    "decoding rows too far apart in length for one product": [(0, 2000, 1), (1, 5, 1), (2, 5, 1)],
    "a first chunk": [(1, 0, 12)],
    "a later chunk": [(1, 20, 12)],
    "decoding rows and chunks": [(2, 6, 1), (3, 0, 7), (0, 11, 1), (1, 30, 5)],
}


def attend_alone(history, query_1HTD):
    """The row's queries against its whole history, heads repeated."""
    key, value = (part.transpose(0, 1)[None].repeat_interleave(GROUPS, dim=1) for part in history)
    count, length = query_1HTD.shape[2], key.shape[2]
    mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    return scaled_dot_product_attention(query_1HTD, key, value, mask, scale=SCALING)[0].transpose(0, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", BATCHES)
def test_each_row_attends_to_its_own_past_only(name, dtype, tolerance):
    torch.manual_seed(0)
    cache = KvCache(CacheShape(1, KV_HEADS, HEAD_DIM), dtype, torch.device("cpu"), 4, 4096, 2**30)
    cache.reserve(4, 2048)
    spans, first = [], 0
    for slot, start, count in BATCHES[name]:
        spans.append(Span(slot, start, first, count))
        first += count
    histories = {span.slot: torch.randn(2, span.length, KV_HEADS, HEAD_DIM, dtype=dtype) for span in spans}
    for slot, (keys, values) in histories.items():
        places = cache.places(torch.full((len(keys),), slot), torch.arange(len(keys)))
        cache.write(0, places, keys, values)
    query = torch.randn(1, KV_HEADS * GROUPS, first, HEAD_DIM, dtype=dtype)
    new = [histories[span.slot][:, span.start :] for span in spans]
    key, value = torch.cat(new, dim=1).transpose(1, 2)[:, None]
    output, _ = attend(LAYER, query, key, value, None, plan=make_plan(cache, spans), scaling=SCALING)
    for span in spans:
        tokens = slice(span.first, span.first + span.count)
        expected = attend_alone(histories[span.slot], query[:, :, tokens])
        assert torch.allclose(output[0, tokens].float(), expected.float(), atol=tolerance), span


@given(st.dictionaries(st.integers(0, 31), st.integers(1, 4000), max_size=32), st.integers(0, 2000))
def test_runs_hold_every_slot_once_and_cost_no_more_than_single_rows(lengths, call_cost):
    runs = split_runs(lengths, call_cost)
    for slot, length in lengths.items():
        assert [longest >= length for first, last, longest in runs if first <= slot <= last] == [True]
    cost = sum((last + 1 - first) * longest + call_cost for first, last, longest in runs)
    assert cost <= sum(length + call_cost for length in lengths.values())


def test_equal_lengths_are_one_run():
    assert split_runs({0: 100, 1: 101, 2: 99}, 400) == [(0, 2, 101)]


def test_a_mask_or_softcap_is_refused():
    for mask, options in ((torch.zeros(1, 1, 1, 1), {}), (None, {"softcap": 30.0})):
        with pytest.raises(ValueError, match="not supported"):
            attend(LAYER, *torch.zeros(3, 1, 1, 1, 1), mask, plan=None, scaling=1.0, **options)
