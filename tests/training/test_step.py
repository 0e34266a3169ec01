"""An optimizer step does not depend on how its rows were packed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.training.recipes import small_config
from training.run import assemble
from training.step import optimizer_step, validation_nll


def trainable(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.peft_model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_micro_batches_do_not_change_the_step(tiny_base: Path, tmp_path: Path, quantisation: str):
    results = []
    for budget in (64, 128, 4096):  # a row or two a pack, some, all
        config = small_config(
            tiny_base, tmp_path, model={"quantisation": quantisation}, optim={"micro_batch_tokens": budget}
        )
        run = assemble(config, tmp_path, tmp_path)
        record = optimizer_step(run, 0)
        results.append((record.nll_nats, record.grad_norm, trainable(run)))
    first = results[0]
    for nll, norm, weights in results[1:]:
        assert nll == pytest.approx(first[0], abs=1e-5)
        assert norm == pytest.approx(first[1], rel=1e-4)
        for name, tensor in weights.items():
            # Adam's first step is lr * sign(gradient): a gradient of rounding size may point either way.
            assert (tensor - first[2][name]).abs().median() < 1e-6


def test_a_step_trains_lora_alone(tiny_base: Path, tmp_path: Path):
    run = assemble(small_config(tiny_base, tmp_path), tmp_path, tmp_path)
    frozen = {n: p.detach().clone() for n, p in run.peft_model.named_parameters() if not p.requires_grad}
    before = copy.deepcopy(trainable(run))
    assert before
    assert all("lora_" in name and "lm_head" not in name for name in before)
    optimizer_step(run, 0)
    assert all(torch.equal(p, frozen[n]) for n, p in run.peft_model.named_parameters() if n in frozen)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainable(run).items())


def test_validation_equals_the_models_own_loss_and_changes_nothing(tiny_base: Path, tmp_path: Path):
    run = assemble(small_config(tiny_base, tmp_path), tmp_path, tmp_path)
    before = trainable(run)
    first = validation_nll(run)
    sums = torch.zeros(2)
    for row in run.data.validation:
        logits = run.peft_model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]
        wanted = torch.tensor(row.labels[1:])
        sums += torch.stack([cross_entropy(logits, wanted, reduction="sum").detach(), (wanted >= 0).sum()])
    assert first == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable(run).items())
    for step in range(8):
        optimizer_step(run, step)
    assert validation_nll(run) < first


def test_a_validation_between_two_steps_changes_neither(tiny_base: Path, tmp_path: Path):
    """Dropout's masks included: each step sees to it that it trains."""
    records = []
    for validates in (False, True):
        run = assemble(small_config(tiny_base, tmp_path, lora={"dropout": 0.5}), tmp_path, tmp_path)
        optimizer_step(run, 0)
        if validates:
            validation_nll(run)
        records.append(optimizer_step(run, 1))
    assert records[0].nll_nats == records[1].nll_nats
    assert records[0].grad_norm == records[1].grad_norm
