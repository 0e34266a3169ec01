"""The chunked loss equals plain cross-entropy, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from training import loss
from training.chat import IGNORED_LABEL
from training.loss import nll_sum


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_value_and_gradient_equal_plain_cross_entropy(chunk_rows, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", chunk_rows * 4 * 50)
    torch.manual_seed(0)
    hidden, head = torch.randn(17, 8, requires_grad=True), torch.randn(50, 8)
    targets = torch.randint(50, (17,))
    targets[::3] = IGNORED_LABEL
    ours = nll_sum(hidden, head, targets)
    (ours * 0.25).backward()
    gradient, hidden.grad = hidden.grad, None
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum", ignore_index=IGNORED_LABEL)
    (plain * 0.25).backward()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, hidden.grad)


def test_no_labelled_position_is_zero_with_a_zero_gradient():
    hidden = torch.randn(4, 8, requires_grad=True)
    value = nll_sum(hidden, torch.randn(50, 8), torch.full((4,), IGNORED_LABEL))
    value.backward()
    assert value == 0
    assert hidden.grad.abs().max() == 0


def test_without_gradient_the_value_is_the_same():
    hidden, head, targets = torch.randn(5, 8), torch.randn(50, 8), torch.randint(50, (5,))
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
        torch.testing.assert_close(nll_sum(hidden, head, targets), plain)
