"""The loss: summed NLL of the labelled positions, with logits computed a chunk at a time."""

from __future__ import annotations

from typing import Any

import torch

from training.chat import IGNORED_LABEL

# N labelled positions, D hidden size, V vocabulary
CHUNK_BYTES = 2**27  # of fp32 logits held at once


def nll_sum(hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Returns the NLL in nats summed over the positions whose target is not -100; a scalar in fp32.

    The head is taken as frozen: its gradient is not computed. The hidden states' gradient is computed along with the
    value, chunk by chunk, so that no logits outlive their chunk and none are computed twice.
    """
    labelled = targets_T != IGNORED_LABEL
    total: torch.Tensor = _ChunkedNll.apply(hidden_TD[labelled], head_VD.detach(), targets_T[labelled])  # type: ignore[no-untyped-call]
    return total


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND, dtype=torch.float32)
        rows = max(CHUNK_BYTES // (4 * head_VD.shape[0]), 1)
        needs_gradient = hidden_ND.requires_grad
        head_VD = head_VD.to(hidden_ND.dtype)
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            logits = (hidden_ND[part] @ head_VD.T).float()
            log_normaliser = logits.logsumexp(-1)
            picked = logits.gather(1, targets_N[part, None]).squeeze(1)
            total += (log_normaliser - picked).sum()
            if needs_gradient:
                probabilities = logits.sub_(log_normaliser[:, None]).exp_()
                probabilities.scatter_add_(1, targets_N[part, None], torch.full_like(picked, -1.0)[:, None])
                gradient_ND[part] = (probabilities.to(head_VD.dtype) @ head_VD).float()
        ctx.save_for_backward(gradient_ND)
        ctx.dtype = hidden_ND.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * grad_total).to(ctx.dtype), None, None
