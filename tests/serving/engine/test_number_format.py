"""A base loads in the format that was asked for, NF4 as training loads it, or is refused with the remedy."""

from __future__ import annotations

import pytest
import torch

from serving.engine import number_format
from serving.engine.engine import WeightFormat
from serving.engine.number_format import check_format, load_model, round_in_place
from serving.engine.product import is_nf4
from serving.errors import ModelRejected
from tests.tiny import make_tiny_model
from training.model import load_base

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_nf4_is_what_training_loads(tiny_base):
    served = load_model(tiny_base, CPU, WeightFormat.NF4, torch.float32)
    trained = dict(load_base(tiny_base, "nf4", torch.float32, CPU).named_modules())
    quantised = {name: module for name, module in served.named_modules() if is_nf4(module)}
    assert len(quantised) == 14
    assert set(quantised) == {name for name, module in trained.items() if is_nf4(module)}
    for name, module in quantised.items():
        ours, theirs = module.weight.quant_state, trained[name].weight.quant_state
        assert torch.equal(module.weight, trained[name].weight)
        assert torch.equal(ours.absmax, theirs.absmax)
        assert torch.equal(ours.state2.absmax, theirs.state2.absmax)
        assert (ours.offset, ours.dtype, ours.blocksize) == (theirs.offset, theirs.dtype, theirs.blocksize)


def test_rounding_in_place_leaves_a_shared_embedding(tmp_path):
    model = load_model(make_tiny_model(tmp_path), CPU, WeightFormat.PLAIN, torch.float32)
    model.lm_head.weight = model.model.embed_tokens.weight
    before = model.model.embed_tokens.weight.clone()
    round_in_place(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert torch.equal(model.lm_head.weight, before.half().float())
    assert not torch.equal(model.lm_head.weight, before)


def test_a_format_that_cannot_be_had_is_refused_with_the_remedy(monkeypatch):
    for weights in WeightFormat:
        check_format(weights, CPU, None)
    check_format(WeightFormat.NF4, CUDA, None)
    with pytest.raises(ModelRejected, match=r"fp16 is for CPUs; .* cuda .*: use --weights plain or nf4"):
        check_format(WeightFormat.FP16, CUDA, None)
    monkeypatch.setattr(number_format, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(ModelRejected, match="needs bitsandbytes, not installed here: pip install bitsandbytes"):
        check_format(WeightFormat.NF4, CPU, None)
    check_format(WeightFormat.FP16, CPU, torch.float32)
    with pytest.raises(ModelRejected, match=r"computes in float32, not in torch\.bfloat16"):
        check_format(WeightFormat.FP16, CPU, torch.bfloat16)
    monkeypatch.setattr(number_format, "has_fbgemm", lambda: False)
    with pytest.raises(ModelRejected, match="needs a PyTorch with FBGEMM"):
        check_format(WeightFormat.FP16, CPU, None)
