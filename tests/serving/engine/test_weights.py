"""A loaded set of weights computes what transformers computes, and what it could not is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from serving.engine.attention import Span, make_plan
from serving.engine.engine import WeightFormat
from serving.engine.kv_cache import KvCache
from serving.engine.number_format import load_model, round_in_place
from serving.engine.weights import Forward, cache_shape, check_config, load_weights
from serving.engine.weights_cost import read_rows
from serving.errors import ModelRejected
from tests.tiny import make_tiny_model

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}


def save(config, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_rows_in_chunks_equal_transformers(name, tmp_path):
    directory = save(CONFIGS[name], tmp_path)
    weights = load_weights(directory, 128, CPU)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = [torch.randint(0, 120, (length,)) for length in (30, 17)]
    cache = KvCache(weights.shape, weights.dtype, weights.device, 2, 128, 2**30)
    cache.reserve(2, 30)
    cuts = [((0, 10), (0, 16)), ((10, 29), (16, 17)), ((29, 30), None)]
    seen = [[], []]
    with torch.inference_mode():
        for cut in cuts:
            parts = [(slot, *limits) for slot, limits in enumerate(cut) if limits]
            ids = torch.cat([rows[slot][start:stop] for slot, start, stop in parts])
            spans, first = [], 0
            for slot, start, stop in parts:
                spans.append(Span(slot, start, first, stop - start))
                first += stop - start
            plan = make_plan(cache, spans)
            logits = weights.logits(weights.forward(Forward(ids, plan.positions_T, plan, ())))
            for span in spans:
                seen[span.slot].append(logits[span.first : span.first + span.count])
        for row, logits in zip(rows, seen, strict=True):
            assert torch.allclose(torch.cat(logits), reference(row[None]).logits[0], atol=1e-4)


def test_a_head_with_a_scale_of_its_own_is_found_out_by_comparing(tmp_path):
    config = GraniteConfig(**SIZES, logits_scaling=4.0)
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelRejected, match="logits differ from transformers"):
        load_weights(tmp_path, 128, CPU)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**SIZES, sliding_window=64), "sliding_window 64 is below context_length 128"),
        (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=1), "sliding_window 64"),
        (Gemma2Config(**SIZES, sliding_window=4096), "softcapping"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
            "'dynamic'",
        ),
    ],
)
def test_what_a_short_comparison_cannot_see_is_refused(config, reason):
    with pytest.raises(ModelRejected, match=reason):
        check_config(config, 128)


def test_a_window_that_holds_the_context_is_fine():
    check_config(MistralConfig(**SIZES, sliding_window=64), 64)
    check_config(Qwen2Config(**SIZES), 128)


def test_a_context_over_the_models_own_is_refused():
    with pytest.raises(ModelRejected, match="max_position_embeddings 128"):
        check_config(LlamaConfig(**SIZES), 129)


def test_the_cache_shape_is_of_key_value_heads():
    shape = cache_shape(CONFIGS["llama"])
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (2, 2, 8)


@pytest.mark.parametrize("weights", [WeightFormat.NF4, WeightFormat.FP16])
def test_a_base_in_fewer_bits_computes_what_transformers_does_with_them(weights, tiny_base):
    loaded = load_weights(tiny_base, 128, CPU, weights)
    reference = load_model(tiny_base, CPU, weights, torch.float32)
    if weights is WeightFormat.FP16:
        round_in_place(reference)
    ids = torch.arange(40) * 13 % 250
    cache = KvCache(loaded.shape, loaded.dtype, loaded.device, 1, 128, 2**30)
    with torch.inference_mode():
        plan = make_plan(cache, [Span(0, 0, 0, 40)])
        logits = loaded.logits(loaded.forward(Forward(ids, plan.positions_T, plan, ())))
        assert torch.allclose(logits, reference(ids[None]).logits[0], atol=1e-3)


def test_only_fp16_has_a_cost_and_it_is_true(tiny_base):
    """Computed again by transformers alone, with the weights rounded here."""
    cost = load_weights(tiny_base, 128, CPU, WeightFormat.FP16).cost
    plain, rounded = (AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(module.weight.half())
        kl = nll = agreed = tokens = 0
        for row in read_rows(tiny_base):
            before, after = (
                torch.log_softmax(model(torch.tensor([row.ids])).logits[0, row.start - 1 : -1].double(), -1)
                for model in (plain, rounded)
            )
            wanted = torch.tensor(row.ids[row.start :])
            kl += float(torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum"))
            nll += float(torch.nn.functional.nll_loss(after, wanted, reduction="sum"))
            nll -= float(torch.nn.functional.nll_loss(before, wanted, reduction="sum"))
            agreed += int((before.argmax(-1) == after.argmax(-1)).sum())
            tokens += len(wanted)
    assert cost.tokens == tokens
    assert cost.kl_nats == pytest.approx(kl / tokens, rel=0.05)
    assert cost.kl_nats > 0
    assert cost.nll_nats == pytest.approx(nll / tokens, rel=0.05)
    assert cost.top1_agreement == pytest.approx(agreed / tokens)
    assert load_weights(tiny_base, 128, CPU, WeightFormat.NF4).cost is None
    assert load_weights(tiny_base, 128, CPU).cost is None


def test_a_set_of_weights_knows_what_it_takes(tmp_path):
    directory = make_tiny_model(tmp_path)
    plain, nf4, fp16 = (load_weights(directory, 128, CPU, weights).size_bytes for weights in WeightFormat)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert plain == model.get_memory_footprint()
    linear = sum(each.weight.nbytes for each in model.modules() if isinstance(each, torch.nn.Linear))
    assert fp16 == plain - linear // 2
    in_nf4 = linear - model.lm_head.weight.nbytes
    assert nf4 == plain - in_nf4 + in_nf4 // 8 + in_nf4 // 64
