"""The optimizer of the adapter's parameters."""

from __future__ import annotations

import torch

from training.config import OptimConfig


def make_optimizer(optim: OptimConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Returns AdamW, or bitsandbytes' 8-bit one whose state moves to host memory when the GPU's is short."""
    if optim.optimizer == "paged_adamw_8bit":
        import bitsandbytes

        paged: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW8bit(
            parameters, lr=optim.learning_rate, weight_decay=optim.weight_decay
        )
        return paged
    return torch.optim.AdamW(parameters, lr=optim.learning_rate, weight_decay=optim.weight_decay)
