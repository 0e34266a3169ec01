"""The cost of a format is the distance between two sets of predictions of the same replies."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoTokenizer

from serving.engine.weights_cost import Row, measure_cost, predictions, read_rows


def test_a_distance_by_hand():
    row = Row(ids=(0, 1, 0), start=1)
    plain, kept = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    cost = measure_cost([plain], [kept], [row])
    assert cost.tokens == 2
    assert cost.kl_nats == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2)
    assert cost.top1_agreement == 0.5
    assert cost.nll_nats == pytest.approx(math.log(0.5 / 0.75) / 2)
    same = measure_cost([plain], [plain], [row])
    assert (same.kl_nats, same.top1_agreement, same.nll_nats) == (0, 1, 0)


def test_each_token_of_a_reply_is_predicted_by_what_stands_before_it():
    logits = torch.randn(5, 7)
    assert torch.equal(predictions(logits, Row((1, 2, 3, 4, 5), 3)), logits[2:4].double().log_softmax(-1))


def test_the_fixed_rows_are_finished_chats_of_several_kinds(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = read_rows(tiny_base)
    assert sum(len(row.ids) - row.start for row in rows) > 100
    for row in rows:
        assert tokenizer.decode(row.ids[: row.start]).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(row.ids[-1:]) == "<|im_end|>"
