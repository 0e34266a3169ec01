"""One whole set of model weights, base or merged, made ready for flattened batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from serving.engine.adapter import read_adapter
from serving.engine.attention import ATTENTION_NAME, AttentionPlan, Span, make_plan, register_attention
from serving.engine.engine import Variant, WeightFormat, WeightsCost
from serving.engine.kv_cache import CacheShape, KvCache
from serving.engine.mixed_lora import ActiveSlices, AdapterSlice, GroupedLinear, LoraFactors, group_linears
from serving.engine.number_format import compute_dtype, load_model, round_in_place
from serving.engine.product import make_product
from serving.engine.weights_cost import measure_cost, predictions, read_rows
from serving.errors import ModelRejected

PROBE_TOKENS = 24  # of the comparison with transformers' own forward at load
# Root mean square of the logits' differences to their spread that rounding explains; another architecture gives 0.5.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}


@dataclass(frozen=True, slots=True)
class Forward:
    """The input of one forward pass over one set of weights."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    plan: AttentionPlan
    slices: tuple[AdapterSlice, ...]


class WeightSet:
    """A decoder whose layers read an AttentionPlan and the active adapters, and its head.

    `size_bytes` is what all weights take; `cost` what their format does to predictions, None where nobody measured it.
    """

    def __init__(self, model: PreTrainedModel, weights: WeightFormat = WeightFormat.PLAIN) -> None:
        config = model.config
        self.cost: WeightsCost | None = None
        self.shape, self.vocabulary = cache_shape(config), int(config.vocab_size)
        self.device, self.dtype = model.device, model.dtype
        self._active = ActiveSlices()
        self._decoder: Any = model.get_decoder()
        prefix = next(name for name, module in model.named_modules() if module is self._decoder)
        members = group_linears(self._decoder, self._active, weights)
        self._members: dict[str, GroupedLinear] = {f"{prefix}.{path}": member for path, member in members.items()}
        head: Any = model.get_output_embeddings()
        product = make_product([head], weights)
        self._head = product.run
        tied = head.weight is self._decoder.get_input_embeddings().weight
        own = [tensor for each in (self._decoder.parameters(), self._decoder.buffers()) for tensor in each]
        groups = {id(member.group): member.group.size_bytes for member in members.values()}
        head_bytes = 0 if tied else product.size_bytes
        self.size_bytes = sum(tensor.nbytes for tensor in own) + sum(groups.values()) + head_bytes

    def forward(self, batch: Forward) -> torch.Tensor:
        """Returns the hidden state of each token: TH."""
        self._active.slices = batch.slices
        output = self._decoder(
            input_ids=batch.ids_T[None], position_ids=batch.positions_T[None], use_cache=False, plan=batch.plan
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Returns RV in float32."""
        return self._head(hidden_RH).float()

    def read_adapter(self, variant: Variant) -> dict[str, LoraFactors]:
        layers = {
            path: (member.group.in_features, member.group.sizes[member.member])
            for path, member in self._members.items()
        }
        return read_adapter(variant, layers)

    def attach(self, variant: Variant, updates: dict[str, LoraFactors]) -> None:
        by_group: dict[int, dict[int, LoraFactors]] = {}
        groups = {id(member.group): member.group for member in self._members.values()}
        for layer, factors in updates.items():
            member = self._members[layer]
            by_group.setdefault(id(member.group), {})[member.member] = factors
        for key, factors_of_members in by_group.items():
            groups[key].attach(variant, factors_of_members)

    def detach(self, variant: Variant) -> None:
        for member in self._members.values():
            member.group.detach(variant)


def load_weights(
    directory: Path,
    context_length: int,
    device: torch.device,
    weights: WeightFormat = WeightFormat.PLAIN,
    dtype: torch.dtype | None = None,
) -> WeightSet:
    """Reads a model directory and proves that it computes what transformers does with the same numbers.

    `dtype` None is the one that suits the device. In fp16 the format's cost is measured before the plain ones go.
    Raises ModelRejected where it computes something else, or could not at every length.
    """
    register_attention()
    check_config(AutoConfig.from_pretrained(directory), context_length)
    with torch.inference_mode():
        model = load_model(directory, device, weights, dtype or compute_dtype(device))
        rows = read_rows(directory) if weights is WeightFormat.FP16 else ()
        plain = [predictions(_expected(model, row.ids), row) for row in rows]
        if weights is WeightFormat.FP16:
            round_in_place(model)
        probe = tuple(at * 7 % int(model.config.vocab_size) for at in range(PROBE_TOKENS))
        expected = _expected(model, probe)
        model.set_attn_implementation(ATTENTION_NAME)
        loaded = WeightSet(model, weights)
        _compare(loaded, probe, expected)
        if rows:
            kept = [predictions(_logits(loaded, row.ids, [0, len(row.ids)]), row) for row in rows]
            loaded.cost = measure_cost(plain, kept, rows)
    return loaded


def cache_shape(config: Any) -> CacheShape:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return CacheShape(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim)


def check_config(config: Any, context_length: int) -> None:
    """Raises ModelRejected for what a short comparison cannot see: windows, and positions that depend on length."""
    longest = config.max_position_embeddings
    if longest < context_length:
        raise ModelRejected(f"{config.model_type}: max_position_embeddings {longest} is below {context_length}")
    layer_types = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    slides = not layer_types or "sliding_attention" in layer_types
    if slides and window is not None and window < context_length:
        raise ModelRejected(
            f"{config.model_type}: sliding_window {window} is below context_length {context_length}; "
            f"set context_length to {window} or less"
        )
    if layer_types - {"full_attention", "sliding_attention"}:
        raise ModelRejected(f"{config.model_type}: layer_types {sorted(layer_types)}; only full attention is supported")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise ModelRejected(f"{config.model_type}: {name} {getattr(config, name)} is not supported")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in {"dynamic", "longrope"}:
        raise ModelRejected(
            f"{config.model_type}: rope_type {rope['rope_type']!r} gives a row positions that depend on the "
            "batch's longest row; use a model with another rope_type"
        )


def _expected(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Returns transformers' own logits: TV in float32."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[0].float()


def _logits(weights: WeightSet, ids: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    """Returns the logits of one row that is computed chunk by chunk, from cut to cut: TV."""
    ids_T = torch.tensor(ids, device=weights.device)
    cache = KvCache(weights.shape, weights.dtype, weights.device, 1, len(ids), 2**40)
    cache.reserve(1, len(ids))
    parts = []
    for start, stop in pairwise(cuts):
        positions = torch.arange(start, stop, device=weights.device)
        plan = make_plan(cache, [Span(0, start, 0, stop - start)])
        parts.append(weights.logits(weights.forward(Forward(ids_T[start:stop], positions, plan, ()))))
    return torch.cat(parts)


def _compare(weights: WeightSet, ids: Sequence[int], expected_TV: torch.Tensor) -> None:
    """Runs the probe as two chunks and then token by token, and compares all logits."""
    half, end = PROBE_TOKENS // 2, PROBE_TOKENS - 4
    logits_TV = _logits(weights, ids, [0, half, end, *range(end + 1, PROBE_TOKENS + 1)])
    difference = (logits_TV - expected_TV).square().mean().sqrt() / expected_TV.std()
    if not difference <= TOLERANCE[weights.dtype]:
        raise ModelRejected(
            f"its logits differ from transformers' own by {float(difference):.2g} of their spread, "
            f"{TOLERANCE[weights.dtype]:.2g} is allowed: the architecture does something this engine does not know; "
            "use vLLM"
        )
