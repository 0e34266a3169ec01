"""One optimizer step over all devices, and the validation NLL."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from training.bad_batch import require_finite
from training.batch import Pack, pack_rows, rank_share, step_rows
from training.budget import within_memory
from training.chat import IGNORED_LABEL, TrainExample
from training.log import StepRecord
from training.model import PackLoss
from training.run import Run
from training.schedule import learning_rate
from training.shard import whole


def optimizer_step(run: Run, step: int) -> StepRecord:
    """Makes optimizer step `step` (0-based). A resumed run repeats its draws: each step seeds its own."""
    begun = time.monotonic()
    optim, accelerator = run.config.optim, run.accelerator
    rows = step_rows(len(run.data.train), optim.batch_size, run.config.run.seed, step)
    examples = [run.data.train[index] for index in rows]
    labelled = sum(example.labelled for example in examples)
    rate = learning_rate(step, run.total, optim)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    _require_training_mode(run)
    mine = _my_rows(run, examples)

    def attempt(budget: int) -> torch.Tensor:
        run.optimizer.zero_grad()
        torch.manual_seed(_step_seed(run.config.run.seed, step, accelerator.process_index))
        return _backward(run, _even(run, pack_rows(mine, budget), examples, budget), labelled)

    nll = within_memory(run, mine, attempt)
    clipped = whole(accelerator.clip_grad_norm_(run.loss.parameters(), optim.max_grad_norm))
    nll_nats, norm = torch.stack((nll, clipped.to(nll))).tolist()  # waits for the device, once
    require_finite(run, step + 1, rows, nll_nats, norm)
    skipped = _update(run, step + 1)
    tokens = sum(len(example.input_ids) for example in examples)
    return StepRecord(
        step=step + 1,
        epoch=round((step + 1) / -(-len(run.data.train) // optim.batch_size), 4),
        nll_nats=nll_nats / labelled,
        learning_rate=rate,
        grad_norm=None if skipped else norm,
        tokens=tokens,
        labelled_tokens=labelled,
        tokens_per_s=tokens / (time.monotonic() - begun),
        peak_gib=peak_gib(accelerator.device),
        overflows=int(skipped),
    )


def _require_training_mode(run: Run) -> None:
    """Asks first: going through a 7B model's modules takes 10 ms, in which its GPU has nothing to do."""
    if not run.network.training:  # what validation and samples switch; not DDP around it
        run.loss.train()


def _update(run: Run, step: int) -> bool:
    """Returns whether fp16's scaler found an overflow and skipped the update."""
    scaler = run.accelerator.scaler
    before = scaler.get_scale() if scaler is not None else 0.0
    run.optimizer.step()
    run.optimizer.zero_grad()
    # By its scale: a fused optimizer skips inside of its kernel, where accelerate's `step_was_skipped` sees nothing.
    if scaler is None or scaler.get_scale() >= before:
        return False
    if run.accelerator.is_main_process:
        scale = scaler.get_scale()
        print(f"step {step}: fp16 overflow, no update; the loss scale is now {scale:g}", file=sys.stderr, flush=True)
    return True


def _my_rows(run: Run, examples: list[TrainExample]) -> list[TrainExample]:
    """This process's share of the step, at least one row: DDP waits for a backward pass from every process."""
    accelerator = run.accelerator
    mine = [
        examples[at] for at in rank_share(range(len(examples)), accelerator.process_index, accelerator.num_processes)
    ]
    return mine or [_unlabelled(examples)]


def _unlabelled(examples: Sequence[TrainExample]) -> TrainExample:
    """Returns the shortest row with nothing to train: a pass that adds nothing."""
    row = min(examples, key=lambda example: len(example.input_ids))
    return replace(row, labels=(IGNORED_LABEL,) * len(row.input_ids))


def _even(run: Run, packs: list[Pack], examples: Sequence[TrainExample], budget: int) -> list[Pack]:
    """Returns as many packs as any process has of these rows: each pass gathers a sharded model from all of them."""
    if run.sharding is None:
        return packs
    world = run.accelerator.num_processes
    shares = [[examples[at] for at in rank_share(range(len(examples)), rank, world)] for rank in range(world)]
    passes = max(len(pack_rows(share, budget)) for share in shares)
    return packs + pack_rows([_unlabelled(examples)], budget) * (passes - len(packs))


def _backward(run: Run, packs: list[Pack], labelled: int) -> torch.Tensor:
    """Accumulates the step's gradient; returns its summed NLL over all processes."""
    accelerator, total = run.accelerator, torch.zeros((), device=run.accelerator.device)
    for number, pack in enumerate(packs):
        last = number == len(packs) - 1
        sync: AbstractContextManager[Any] = nullcontext() if last else accelerator.no_sync(run.loss)
        with sync, accelerator.autocast():
            nll = run.loss(pack.to(accelerator.device))
            # DDP averages over processes; the loss is a mean over the labelled tokens of the whole step.
            accelerator.backward(nll * (accelerator.num_processes / labelled))
        total += nll.detach()
    summed: torch.Tensor = accelerator.reduce(total, "sum")
    return summed


@torch.no_grad()
def validation_nll(run: Run) -> float | None:
    """Returns the NLL in nats a labelled token of the validation rows, or None where there are none."""
    if not run.data.validation:
        return None
    accelerator = run.accelerator
    network = run.network.eval()  # a rank may have no rows
    share = rank_share(range(len(run.data.validation)), accelerator.process_index, accelerator.num_processes)
    mine = [run.data.validation[at] for at in share]
    rows = run.data.validation
    sums = within_memory(
        run, mine, lambda budget: _nll_and_labelled(run, network, _even(run, pack_rows(mine, budget), rows, budget))
    )
    nll, labelled = accelerator.reduce(sums, "sum").tolist()
    return float(nll / labelled)


def _nll_and_labelled(run: Run, network: PackLoss, packs: list[Pack]) -> torch.Tensor:
    """Returns the packs' summed NLL in nats and their labelled tokens, fp64 [2]."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.accelerator.device)
    for pack in packs:
        with run.accelerator.autocast():
            sums[0] += network(pack.to(run.accelerator.device))
        sums[1] += pack.labelled
    return sums


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, step, rank]).encode()).digest()[:7], "big")


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on its GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; its ru_maxrss counts the parent's peak too
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
