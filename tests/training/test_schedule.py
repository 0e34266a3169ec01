"""The learning rate: up, then down to zero just after the last step."""

from __future__ import annotations

import pytest

from training.config import OptimConfig
from training.schedule import learning_rate, total_steps


def optim(**changes):
    return OptimConfig(**{"learning_rate": 1.0, "warmup_ratio": 0.1, "epochs": 2, "batch_size": 4, **changes})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_warms_up_to_its_peak_and_never_exceeds_it(schedule):
    rates = [learning_rate(step, 100, optim(schedule=schedule)) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert max(rates) == pytest.approx(1.0)
    falls = rates[10:]
    assert falls == sorted(falls, reverse=True)
    assert (falls[-1] == 1.0) if schedule == "constant" else (0 < falls[-1] < 0.02)


def test_steps_cover_all_epochs_unless_capped():
    assert total_steps(10, optim()) == 6
    assert total_steps(10, optim(max_steps=5)) == 5
    assert total_steps(10, optim(max_steps=50)) == 6
