"""Where memory runs out the same step is made in smaller packs, and nothing else about it changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.recipes import small_config
from training import train as train_module
from training.artifact import ADAPTER_WEIGHTS
from training.budget import MemoryLimitError, within_memory
from training.checkpoint import newest
from training.run import Run, assemble
from training.step import optimizer_step, validation_nll
from training.stop import TrainingStopped
from training.train import Start, train


def real_failure() -> None:
    torch.empty(2**50)  # a petabyte: PyTorch's CPU allocator refuses it


def cuda_failure() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cap_tokens(model: Any, limit: int, fail: Callable[[], None], *, backward: bool = False) -> list[int]:
    """Makes the model's last block fail on packs of more than `limit` tokens, going in or coming back.

    Returns the sizes of all packs tried.
    """
    sizes: list[int] = []
    block = model.get_base_model().get_decoder().layers[-1]

    def before(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        sizes.append(args[0].shape[1])
        if sizes[-1] > limit and not backward:
            fail()

    def after(_: Any, gradients: Any, __: Any) -> None:
        if gradients[0].shape[1] > limit:
            fail()

    block.register_forward_pre_hook(before)
    if backward:
        block.register_full_backward_hook(after)
    return sizes


def make_run(base: Path, folder: Path, **sections: dict[str, Any]) -> Run:
    return assemble(small_config(base, folder, **sections), folder / "run", folder)


def gradients_step(run: Run) -> tuple[float, float | None]:
    record = optimizer_step(run, 0)
    return record.nll_nats, record.grad_norm


@pytest.mark.parametrize("fail", [real_failure, cuda_failure])
@pytest.mark.parametrize("backward", [False, True])
def test_the_step_is_the_same_in_smaller_packs(tiny_base: Path, tmp_path: Path, capsys, fail, backward: bool):
    expected = gradients_step(make_run(tiny_base, tmp_path))
    run = make_run(tiny_base, tmp_path)
    sizes = cap_tokens(run.peft_model, 150, fail, backward=backward)
    assert gradients_step(run) == pytest.approx(expected, rel=1e-5)
    assert max(sizes) > 150, "the cap never bit"
    assert run.micro_batch_tokens <= 150
    error = capsys.readouterr().err
    assert f"out of memory with 256 tokens a forward pass; the step starts again with {run.micro_batch_tokens}" in error


def test_later_steps_keep_the_smaller_budget(tiny_base: Path, tmp_path: Path):
    run = make_run(tiny_base, tmp_path)
    sizes = cap_tokens(run.peft_model, 150, cuda_failure)
    optimizer_step(run, 0)
    failed = sum(size > 150 for size in sizes)
    assert failed
    for step in range(1, 4):
        optimizer_step(run, step)
    validation_nll(run)
    assert sum(size > 150 for size in sizes) == failed


def test_a_row_is_never_split_and_the_floor_names_what_helps(tiny_base: Path, tmp_path: Path):
    run = make_run(tiny_base, tmp_path)
    longest = max(len(example.input_ids) for example in run.data.train)
    sizes = cap_tokens(run.peft_model, 8, cuda_failure)
    with pytest.raises(MemoryLimitError) as caught:
        optimizer_step(run, 0)
    for word in ("data.cutoff = 64", "optim.micro_batch_tokens", "gradient_checkpointing", "nf4", "2.00 GiB"):
        assert word in str(caught.value)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= longest
    assert sizes[-1] in {len(example.input_ids) for example in run.data.train}


def test_halving_counts_from_what_the_step_really_packs(tiny_base: Path, tmp_path: Path):
    run = make_run(tiny_base, tmp_path, optim={"micro_batch_tokens": 1_000_000})
    sizes = cap_tokens(run.peft_model, 200, cuda_failure)
    optimizer_step(run, 0)
    assert sum(size > 200 for size in sizes) <= 3


def test_other_errors_pass(tiny_base: Path, tmp_path: Path):
    run = make_run(tiny_base, tmp_path)

    def broken(_: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot"):
        within_memory(run, run.data.train, broken)
    assert run.micro_batch_tokens == 256


def test_validation_shrinks_its_packs_too(tiny_base: Path, tmp_path: Path):
    run = make_run(tiny_base, tmp_path)
    expected = validation_nll(run)
    longest = max(len(example.input_ids) for example in run.data.validation)
    sizes = cap_tokens(run.peft_model, longest, cuda_failure)
    assert validation_nll(run) == pytest.approx(expected, rel=1e-6)
    assert max(sizes) > longest


def test_a_run_of_short_memory_resumes_to_the_same_bytes(tiny_base: Path, tmp_path: Path, monkeypatch):
    """Dropout's draws follow the packs, so the budget is part of a checkpoint."""
    config = small_config(tiny_base, tmp_path, lora={"dropout": 0.1})
    real, stop_at, limit = train_module.optimizer_step, [0], [150]

    def step(run: Run, number: int) -> Any:
        if limit[0]:
            cap_tokens(run.peft_model, limit[0], lambda: cuda_failure() if run.peft_model.training else None)
            limit[0] = 0  # the probes, without gradients, take a fraction of a step's memory
        record = real(run, number)
        if number + 1 == stop_at[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    monkeypatch.setattr(train_module, "optimizer_step", step)
    train(config, tmp_path / "whole", tmp_path)
    stop_at[0], limit[0] = 3, 150
    with pytest.raises(TrainingStopped):
        train(config, tmp_path / "stopped", tmp_path)
    assert newest(tmp_path / "stopped" / "checkpoints") is not None
    stop_at[0] = 0
    train(config, tmp_path / "stopped", tmp_path, Start.RESUME)  # no cap now: the budget is remembered
    files = [(tmp_path / run / "adapter" / ADAPTER_WEIGHTS).read_bytes() for run in ("whole", "stopped")]
    assert files[0] == files[1]


def test_several_processes_are_told_instead_of_hung(tiny_base: Path, tmp_path: Path):
    run = make_run(tiny_base, tmp_path)

    class Two:
        num_processes = 2

    with pytest.raises(MemoryLimitError, match="2 processes run: lower"):
        within_memory(replace(run, accelerator=Two()), run.data.train, lambda _: cuda_failure())
