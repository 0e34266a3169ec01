"""NEFTune: uniform noise on the embeddings of a training step, against overfitting (arXiv 2310.05914)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def add_noise(embeddings_TD: torch.Tensor, row_lengths: Sequence[int], alpha: float) -> torch.Tensor:
    """Returns the embeddings with noise within alpha / sqrt(L D) of them, L the tokens of the position's own row."""
    lengths = torch.tensor(row_lengths, device=embeddings_TD.device)
    bound_T = (alpha / (lengths * embeddings_TD.shape[1]).sqrt()).repeat_interleave(lengths)
    noise_TD = torch.empty_like(embeddings_TD).uniform_(-1, 1)
    return embeddings_TD + noise_TD * bound_T[:, None].to(embeddings_TD.dtype)
