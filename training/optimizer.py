"""The optimizer of the adapter's parameters."""

from __future__ import annotations

import torch

from training.config import OptimConfig
from training.quantised import paged_adamw_8bit


def make_optimizer(optim: OptimConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Returns AdamW, or bitsandbytes' 8-bit one whose state moves to host memory when the GPU's is short."""
    if optim.optimizer == "paged_adamw_8bit":
        return paged_adamw_8bit(parameters, optim.learning_rate, optim.weight_decay)
    on_gpu = all(parameter.is_cuda for parameter in parameters)  # there one kernel updates all of them
    return torch.optim.AdamW(parameters, lr=optim.learning_rate, weight_decay=optim.weight_decay, fused=on_gpu or None)
