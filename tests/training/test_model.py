"""The model under training: NF4 is real, the head stays untouched, what cannot be trained is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from training.batch import pack_rows
from training.chat import TrainExample
from training.config import LoraConfig
from training.model import (
    ModelError,
    PackLoss,
    add_lora,
    compute_dtype,
    load_base,
    refuse_unsupported,
    use_checkpointing,
)

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4)


def packs() -> list:
    rows = [TrainExample(tuple(range(start, start + 9)), tuple(range(start, start + 9))) for start in (5, 40, 90)]
    return pack_rows(rows, 100)


def test_nf4_stores_half_a_byte_a_weight(tiny_base: Path):
    model = load_base(tiny_base, "nf4", torch.float32, CPU)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.numel() == 64 * 128 / 2
    assert layer.weight.quant_state.nested
    assert layer.weight.quant_state.quant_type == "nf4"
    assert model.lm_head.weight.dtype == torch.float32


def test_a_pack_equals_its_rows_alone_in_loss_and_gradients(tiny_base: Path):
    model = add_lora(load_base(tiny_base, "none", torch.float32, CPU), LORA, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    network = PackLoss(model)

    def gradients(groups: list) -> tuple[float, list[torch.Tensor]]:
        network.zero_grad()
        loss = torch.stack([network(pack) for pack in groups]).sum()
        loss.backward()
        return loss.item(), [p.grad.clone() for p in network.parameters() if p.requires_grad]

    (together,) = packs()
    rows = [tuple(row.tolist()) for row in together.input_ids_T.split(together.row_lengths)]
    alone = [pack for row in rows for pack in pack_rows([TrainExample(row, row)], 100)]
    loss, packed = gradients([together])
    loss_alone, separate = gradients(alone)
    assert loss == pytest.approx(loss_alone, rel=1e-6)
    for left, right in zip(packed, separate, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_recomputing_activations_changes_no_gradient(tiny_base: Path):
    results = []
    for recompute in (False, True):
        model = add_lora(load_base(tiny_base, "nf4", torch.float32, CPU), LORA, seed=0)
        if recompute:
            use_checkpointing(model)
        network = PackLoss(model).train()
        network(packs()[0]).backward()
        results.append([p.grad.clone() for p in network.parameters() if p.requires_grad])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def test_the_same_seed_starts_the_same_adapter(tiny_base: Path):
    first, second = (add_lora(load_base(tiny_base, "none", torch.float32, CPU), LORA, seed=3) for _ in range(2))
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_cpu_computes_in_fp32_and_refuses_fp16():
    assert compute_dtype("auto", CPU) == torch.float32
    with pytest.raises(ModelError, match="CUDA"):
        compute_dtype("float16", CPU)


def test_the_loss_is_the_models_own(tiny_base: Path):
    model = load_base(tiny_base, "none", torch.float32, CPU)
    (pack,) = pack_rows([TrainExample(tuple(range(5, 30)), tuple(range(5, 30)))], 100)
    logits = model(input_ids=pack.input_ids_T[None]).logits[0]
    plain = torch.nn.functional.cross_entropy(logits[:-1], pack.input_ids_T[1:], reduction="sum")
    torch.testing.assert_close(PackLoss(model)(pack), plain)


def test_a_head_that_does_more_than_a_product_is_refused(tiny_base: Path, tmp_path: Path):
    from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(vocab_size=400, num_key_value_heads=2, logits_scaling=8.0, **sizes)
    torch.manual_seed(0)
    model = GraniteForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="more than a product"):
        load_base(tmp_path, "none", torch.float32, CPU)


@pytest.mark.parametrize(
    "setting", [{"final_logit_softcapping": 30.0}, {"sliding_window": 4096}, {"attention_dropout": 0.1}]
)
def test_models_it_would_get_wrong_are_refused(setting):
    with pytest.raises(ModelError, match="not supported"):
        refuse_unsupported(LlamaConfig(**setting))
