"""NEFTune's noise: bounded by each row's own length, in training alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.recipes import small_config
from training.batch import pack_rows
from training.neftune import add_noise
from training.run import assemble
from training.step import optimizer_step, validation_nll

LENGTHS = (4, 100, 25)
ALPHA, WIDTH = 5.0, 64


def test_the_noise_fills_the_bound_of_each_row_and_never_passes_it():
    torch.manual_seed(0)
    noise = add_noise(torch.zeros(sum(LENGTHS), WIDTH), LENGTHS, ALPHA)
    for length, part in zip(LENGTHS, noise.split(LENGTHS), strict=True):
        bound = ALPHA / (length * WIDTH) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound
        assert abs(part.mean()) < 0.1 * bound


def test_the_embeddings_dtype_and_gradient_pass_through():
    embeddings = torch.zeros(6, 8, dtype=torch.bfloat16, requires_grad=True)
    noisy = add_noise(embeddings, (2, 4), 1.0)
    assert noisy.dtype == torch.bfloat16
    noisy.sum().backward()
    assert torch.equal(embeddings.grad, torch.ones_like(embeddings))


@pytest.mark.parametrize("recompute", ["off", "on"])
def test_noise_changes_training_and_not_validation(tiny_base: Path, tmp_path: Path, recompute: str):
    plain = assemble(small_config(tiny_base, tmp_path), tmp_path, tmp_path)
    noisy = assemble(
        small_config(tiny_base, tmp_path, optim={"neftune_alpha": 15.0}, run={"gradient_checkpointing": recompute}),
        tmp_path,
        tmp_path,
    )
    assert validation_nll(noisy) == validation_nll(plain)
    assert optimizer_step(noisy, 0).nll_nats != pytest.approx(optimizer_step(plain, 0).nll_nats, abs=1e-4)
    norms = [p.abs().sum() for n, p in noisy.peft_model.named_parameters() if "lora_B" in n]
    assert all(norm > 0 for norm in norms)


def test_no_noise_gives_the_hidden_states_of_the_ids(tiny_base: Path, tmp_path: Path):
    run = assemble(small_config(tiny_base, tmp_path, optim={"neftune_alpha": 1e-6}), tmp_path, tmp_path)
    (pack,) = pack_rows(run.data.train[:3], 4096)
    trained, plain = run.loss.train().hidden(pack), run.loss.eval().hidden(pack)
    assert not torch.equal(trained, plain)
    assert torch.allclose(trained, plain, atol=1e-4)


def test_a_step_with_noise_is_repeatable(tiny_base: Path, tmp_path: Path):
    config = small_config(tiny_base, tmp_path, optim={"neftune_alpha": 5.0})
    first, second = (optimizer_step(assemble(config, tmp_path, tmp_path), 0) for _ in range(2))
    assert (first.nll_nats, first.grad_norm) == (second.nll_nats, second.grad_norm)
