"""The fused LoRA linear layer computes what peft's own does, forward and backward, and steps aside for variants."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from training.batch import Pack
from training.config import LoraConfig
from training.lora_linear import fuse_lora
from training.model import PackLoss, add_lora, load_base

CPU = torch.device("cpu")


def adapted(base, quantisation="none", dropout=0.0, rslora=False, dtype=torch.float32):
    config = LoraConfig(rank=4, alpha=16.0, dropout=dropout, rslora=rslora)
    model = add_lora(load_base(base, quantisation, dtype, CPU), config, 1)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def unfused(model: Any) -> Any:
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model


def loss_and_gradient(model: Any, autocast: bool = False) -> tuple[float, torch.Tensor]:
    ids = torch.randint(3, 390, (60,), generator=torch.Generator().manual_seed(1))
    pack = Pack(ids, ids, torch.cat([torch.arange(40), torch.arange(20)]), (40, 20))
    torch.manual_seed(5)  # of the dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = PackLoss(model).train()(pack)
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
    return float(loss.detach()), torch.cat(gradients)


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rslora", [False, True])
def test_loss_and_gradients_are_peft_s(tiny_base, quantisation, dropout, rslora):
    options = (tiny_base, quantisation, dropout, rslora)
    ours, gradient = loss_and_gradient(adapted(*options))
    theirs, expected = loss_and_gradient(unfused(adapted(*options)))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert far(gradient, expected) < 1e-5


def test_half_precision_agrees_with_peft_within_its_rounding(tiny_base):
    options = (tiny_base, "none", 0.0, False, torch.bfloat16)
    ours, gradient = loss_and_gradient(adapted(*options), autocast=True)
    theirs, expected = loss_and_gradient(unfused(adapted(*options)), autocast=True)
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert far(gradient, expected) < 0.1


def test_bias_is_added(tiny_base):
    model = adapted(tiny_base)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    x = torch.randn(2, 3, layer.in_features)
    without = layer(x)
    layer.base_layer.bias = torch.nn.Parameter(torch.ones(layer.out_features), requires_grad=False)
    torch.testing.assert_close(layer(x), without + 1)


def test_a_disabled_adapter_leaves_the_base(tiny_base):
    model = adapted(tiny_base)
    ids = torch.arange(3, 20)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)(ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids).logits, plain, atol=1e-2)


def test_dropout_is_off_in_evaluation(tiny_base):
    model = adapted(tiny_base, dropout=0.5).eval()
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_every_layer_is_fused_and_dora_is_left_to_peft(tiny_base):
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    plain = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    layers = sum(isinstance(module, LoraLayer) for module in plain.modules())
    assert fuse_lora(plain) == layers == 14
    other = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    assert fuse_lora(peft.get_peft_model(other, config)) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the tracer's own doing
def test_compiled_blocks_are_one_program_for_every_pack_and_the_same_numbers(tiny_base):
    """By the tracer alone; a GPU's kernels are measured by benchmarks/training.py."""
    model = adapted(tiny_base, "nf4")
    expected = loss_and_gradient(adapted(tiny_base, "nf4"))
    model.enable_input_require_grads()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.get_base_model().get_decoder().layers:
        block.compile(dynamic=True, fullgraph=True, backend=counter)
    loss, gradient = loss_and_gradient(model)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert far(gradient, expected[1]) < 1e-5
    programs = counter.frame_count
    ids = torch.arange(3, 103)
    positions = torch.cat([torch.arange(70), torch.arange(30)])
    PackLoss(model).train()(Pack(ids, ids, positions, (70, 30))).backward()
    assert counter.frame_count == programs  # rows of other lengths run what is compiled already
