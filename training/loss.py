"""The loss: summed NLL of the labelled positions, with logits computed a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from training.chat import IGNORED_LABEL

# N labelled positions, D hidden size, V vocabulary
CHUNK_BYTES = 2**27  # of fp32 logits held at once

ChunkNll = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def chunk_nll(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the summed NLL in nats and its gradient with respect to the logits, both in fp32."""
    logits_NV = logits_NV.float()
    log_normaliser_N1, nll = _nll(logits_NV, targets_N)
    gradient_NV = logits_NV.sub_(log_normaliser_N1).exp_()
    return nll, gradient_NV.scatter_add_(1, targets_N[:, None], gradient_NV.new_full((len(targets_N), 1), -1.0))


def chunk_nll_to_compile(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `chunk_nll`, without steps in place: compiled, no fp32 logits exist. The gradient is in the logits' dtype."""
    log_normaliser_N1, nll = _nll(logits_NV.float(), targets_N)
    probabilities_NV = (logits_NV.float() - log_normaliser_N1).exp()
    at_target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets_N[:, None]
    return nll, (probabilities_NV - at_target_NV.float()).to(logits_NV.dtype)


def _nll(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_normaliser_N1 = logits_NV.logsumexp(-1, keepdim=True)
    return log_normaliser_N1, (log_normaliser_N1 - logits_NV.gather(1, targets_N[:, None])).sum()


def nll_sum(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, of_chunk: ChunkNll = chunk_nll
) -> torch.Tensor:
    """Returns the NLL in nats summed over the positions whose target is not -100; a scalar in fp32.

    The head is taken as frozen: its gradient is not computed. The hidden states' gradient is computed along with the
    value, chunk by chunk, so that no logits outlive their chunk and none are computed twice.
    """
    labelled = (targets_T != IGNORED_LABEL).nonzero()[:, 0]
    total: torch.Tensor = _ChunkedNll.apply(  # type: ignore[no-untyped-call]
        hidden_TD[labelled], head_VD.detach(), targets_T[labelled], of_chunk
    )
    return total


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor, of_chunk: ChunkNll
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND, dtype=torch.float32)
        rows = max(CHUNK_BYTES // (4 * head_VD.shape[0]), 1)
        needs_gradient = hidden_ND.requires_grad
        head_VD = head_VD.to(hidden_ND.dtype)
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            logits = hidden_ND[part] @ head_VD.T
            if not needs_gradient:
                total += _nll(logits.float(), targets_N[part])[1]
                continue
            nll, logits_gradient = of_chunk(logits, targets_N[part])
            total += nll
            gradient_ND[part] = (logits_gradient.to(head_VD.dtype) @ head_VD).float()
        ctx.save_for_backward(gradient_ND)
        ctx.dtype = hidden_ND.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * grad_total).to(ctx.dtype), None, None, None
