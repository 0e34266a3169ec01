"""Attention of a flattened batch over the cache: one token of each decoding row, and chunks of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from serving.engine.kv_cache import KvCache

# T token of the forward pass, N row of a run, H query head, K key/value head, G query heads a K, L position, D head dim
ATTENTION_NAME = "graft_slots"
# What one more product costs a layer, counted in cached positions read: 40 us a call against 0.1 us a position on
# two AVX2 cores; on a GPU a call costs some 30 us and a position under a nanosecond.
CALL_COST_CPU, CALL_COST_CUDA = 400, 50_000


@dataclass(frozen=True, slots=True)
class Span:
    """`count` neighbouring tokens of the batch: those of the row in `slot`, from position `start` on."""

    slot: int
    start: int
    first: int
    count: int

    @property
    def length(self) -> int:
        """Positions that the last token sees."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Run:
    """Decoding rows in neighbouring slots, attended in one product over a view of the cache; `mask` hides what a
    row does not have. A slot without a token in this pass computes a result that nobody reads."""

    first: int
    last: int
    length: int
    token_of_slot: torch.Tensor  # N
    kept: torch.Tensor  # rows of the run that have a token
    tokens: torch.Tensor  # the tokens of those
    mask: torch.Tensor  # added to the scores: (NK)1L


@dataclass(frozen=True, slots=True)
class Chunk:
    span: Span
    mask: torch.Tensor | None  # None: the chunk starts its row, so plain causal


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """All that the layers of one forward pass need to attend."""

    cache: KvCache
    positions_T: torch.Tensor
    places: torch.Tensor  # in the cache
    runs: tuple[Run, ...]
    chunks: tuple[Chunk, ...]
    direct: bool  # one run whose slots are the batch's tokens, in order: nothing to gather or to scatter


def make_plan(cache: KvCache, spans: Sequence[Span]) -> AttentionPlan:
    """Lays out the attention of spans that stand in the batch one after the other; the cache has room for them."""
    device = cache.keys[0].device
    call_cost = CALL_COST_CPU if device.type == "cpu" else CALL_COST_CUDA
    decoding = {span.slot: span for span in spans if span.count == 1}
    lengths = {slot: span.length for slot, span in decoding.items()}
    slots_T = torch.tensor([span.slot for span in spans for _ in range(span.count)], device=device)
    positions_T = torch.tensor([at for span in spans for at in range(span.start, span.length)], device=device)
    runs = tuple(_run(decoding, *limits, cache.keys[0]) for limits in split_runs(lengths, call_cost))
    chunks = tuple(Chunk(span, _chunk_mask(span, cache.keys[0])) for span in spans if span.count > 1)
    in_order = [span.slot for span in spans] == list(range(spans[0].slot, spans[0].slot + len(spans)))
    direct = len(runs) == 1 and not chunks and in_order
    return AttentionPlan(cache, positions_T, cache.places(slots_T, positions_T), runs, chunks, direct)


def split_runs(lengths: dict[int, int], call_cost: int) -> list[tuple[int, int, int]]:
    """Groups slots, by their lengths, to runs (first, last, longest): a run that saves a call for less than its
    padding costs is extended."""
    runs: list[tuple[int, int, int]] = []
    for slot, length in sorted(lengths.items()):
        if runs:
            first, last, longest = runs[-1]
            widened = (slot + 1 - first) * max(longest, length)
            if widened <= (last + 1 - first) * longest + length + call_cost:
                runs[-1] = (first, slot, max(longest, length))
                continue
        runs.append((slot, slot, length))
    return runs


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    plan: AttentionPlan,
    scaling: float,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query 1HTD, key and value 1KTD; returns 1THD. `plan` comes with the call."""
    if attention_mask is not None or options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} asks for an attention mask, softcap or sinks; not supported here")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    plan.cache.write(layer, plan.places, key[0].transpose(0, 1), value[0].transpose(0, 1))
    keys, values = plan.cache.keys[layer], plan.cache.values[layer]
    query_THD = query[0].transpose(0, 1)
    if plan.direct:
        return _attend_run(query_THD, keys, values, plan.runs[0], scaling)[None], None
    output_THD = torch.empty(query_THD.shape, dtype=query.dtype, device=query.device)
    for run in plan.runs:
        attended = _attend_run(query_THD[run.token_of_slot], keys, values, run, scaling)
        output_THD[run.tokens] = attended[run.kept]
    for chunk in plan.chunks:
        end = chunk.span.first + chunk.span.count
        output_THD[chunk.span.first : end] = _attend_chunk(query_THD, keys, values, chunk, scaling)
    return output_THD[None], None


def register_attention() -> None:
    """Makes `attend` known to transformers, under ATTENTION_NAME."""
    AttentionInterface.register(ATTENTION_NAME, attend)


def _attend_run(
    query_NHD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, run: Run, scaling: float
) -> torch.Tensor:
    """The query heads of a key/value head are its queries: no head is repeated, and the cache is not copied."""
    (rows, _, head_dim), kv_heads = query_NHD.shape, keys.shape[1]
    shape = (rows * kv_heads, -1, head_dim)
    query = query_NHD.reshape(shape)
    key = keys[run.first : run.last + 1].view(shape)[:, : run.length]
    value = values[run.first : run.last + 1].view(shape)[:, : run.length]
    if query.dtype == torch.float32:  # a third faster than the fused kernel for one token a row on a CPU
        scores = torch.baddbmm(run.mask, query, key.transpose(1, 2), alpha=scaling)
        attended = torch.bmm(torch.softmax(scores, -1), value)
    else:  # the fused kernel keeps its scores in float32
        attended = functional.scaled_dot_product_attention(query, key, value, run.mask, scale=scaling)
    return attended.view(query_NHD.shape)


def _attend_chunk(
    query_THD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: Chunk, scaling: float
) -> torch.Tensor:
    """Key/value heads are the batch, so that `expand` serves their query heads without a copy."""
    span, kv_heads = chunk.span, keys.shape[1]
    query = query_THD[span.first : span.first + span.count].transpose(0, 1).unflatten(0, (kv_heads, -1))
    size = (kv_heads, query.shape[1], span.length, query.shape[-1])
    key = keys[span.slot, :, None, : span.length].expand(size)
    value = values[span.slot, :, None, : span.length].expand(size)
    attended = functional.scaled_dot_product_attention(
        query, key, value, chunk.mask, is_causal=chunk.mask is None, scale=scaling
    )
    return attended.flatten(0, 1).transpose(0, 1)


def _run(decoding: dict[int, Span], first: int, last: int, length: int, keys: torch.Tensor) -> Run:
    device, kv_heads = keys.device, keys.shape[1]
    spans = [decoding.get(slot) for slot in range(first, last + 1)]
    kept = [index for index, span in enumerate(spans) if span is not None]
    tokens = [span.first for span in spans if span is not None]
    token_of_slot = torch.tensor([0 if span is None else span.first for span in spans], device=device)
    seen = torch.tensor([1 if span is None else span.length for span in spans], device=device)
    hidden = torch.arange(length, device=device) >= seen.repeat_interleave(kv_heads)[:, None, None]
    mask = keys.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return Run(
        first, last, length, token_of_slot, torch.tensor(kept, device=device), torch.tensor(tokens, device=device), mask
    )


def _chunk_mask(span: Span, keys: torch.Tensor) -> torch.Tensor | None:
    if span.start == 0:
        return None
    positions = torch.arange(span.length, device=keys.device)
    hidden = positions[None, :] > positions[span.start :, None]
    return keys.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
