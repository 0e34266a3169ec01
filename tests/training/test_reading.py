"""A reading holds the states before reply tokens, row by row; rounding anew moves weights as a rounding would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.chat import TrainExample
from training.reading import head_of, load_merged, read, round_anew

CPU = torch.device("cpu")


def test_a_reading_predicts_the_labelled_tokens_of_each_row(tiny_base: Path):
    rows = [(tuple(range(start, start + length)), length) for start, length in ((5, 9), (60, 14), (90, 6))]
    examples = [TrainExample(ids, (-100,) * 3 + ids[3:]) for ids, _ in rows]
    model = load_merged(tiny_base, CPU)
    found = read(model, examples)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    for number, (ids, length) in enumerate(sorted(rows, key=lambda row: -row[1])):
        here = found.rows_N == number
        assert found.targets_N[here].tolist() == list(ids[3:])
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0, 2 : length - 1]
        torch.testing.assert_close(found.hidden_ND[here] @ head_of(model).T, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_anew_has_a_rounding_errors_size_and_keeps_zeros(dtype: torch.dtype):
    layer = torch.nn.Linear(400, 400, dtype=dtype)
    layer.weight.data[:, 0] = 0
    before = layer.weight.detach().clone()
    round_anew(layer, ["weight"])
    steps = layer.weight.view(torch.int16).int() - before.view(torch.int16).int()
    assert (layer.weight[:, 0] == 0).all()
    assert layer.weight.isfinite().all()
    assert set(steps.unique().tolist()) == {-1, 0, 1}
    assert steps[:, 1:].double().var().item() == pytest.approx(1 / 12, rel=0.05)
    assert abs(steps.double().mean().item()) < 0.005
