"""The learning rate of each optimizer step."""

from __future__ import annotations

import math

from training.config import OptimConfig


def total_steps(rows: int, optim: OptimConfig) -> int:
    """Returns the optimizer steps of a whole run: all epochs, or `max_steps` where that is fewer."""
    steps = math.ceil(rows / optim.batch_size) * optim.epochs
    return steps if optim.max_steps is None else min(steps, optim.max_steps)


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Returns the rate of step `step` (0-based): linear warmup, then the schedule down to zero after the last step."""
    warmup = math.ceil(optim.warmup_ratio * total)
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.learning_rate
    done = (step - warmup) / max(total - warmup, 1)
    factor = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return optim.learning_rate * factor
