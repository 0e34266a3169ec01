"""One optimizer step over all devices, and the validation NLL."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from training.batch import Pack, pack_rows, rank_share, step_rows
from training.chat import IGNORED_LABEL, TrainExample
from training.log import StepRecord
from training.run import Run
from training.schedule import learning_rate


def optimizer_step(run: Run, step: int) -> StepRecord:
    """Makes optimizer step `step` (0-based). A resumed run repeats its draws: each step seeds its own."""
    begun = time.monotonic()
    optim, accelerator = run.config.optim, run.accelerator
    rows = step_rows(len(run.data.train), optim.batch_size, run.config.run.seed, step)
    examples = [run.data.train[index] for index in rows]
    labelled = sum(example.labelled for example in examples)
    torch.manual_seed(_step_seed(run.config.run.seed, step, accelerator.process_index))
    rate = learning_rate(step, run.total, optim)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.loss.train()
    nll_nats = _backward(run, _my_packs(run, examples), labelled)
    norm = accelerator.clip_grad_norm_(run.loss.parameters(), optim.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    tokens = sum(len(example.input_ids) for example in examples)
    return StepRecord(
        step=step + 1,
        epoch=round((step + 1) * optim.batch_size / len(run.data.train), 4),
        nll_nats=nll_nats / labelled,
        learning_rate=rate,
        grad_norm=float(norm),
        tokens=tokens,
        labelled_tokens=labelled,
        tokens_per_s=tokens / (time.monotonic() - begun),
        peak_gib=peak_gib(accelerator.device),
    )


def _my_packs(run: Run, examples: list[TrainExample]) -> list[Pack]:
    """This process's share of the step, at least one pack: DDP waits for a backward pass from every process."""
    accelerator = run.accelerator
    mine = [
        examples[at] for at in rank_share(range(len(examples)), accelerator.process_index, accelerator.num_processes)
    ]
    if not mine:
        mine = [replace(examples[0], labels=(IGNORED_LABEL,) * len(examples[0].input_ids))]
    return pack_rows(mine, run.config.optim.micro_batch_tokens)


def _backward(run: Run, packs: list[Pack], labelled: int) -> float:
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
    return float(accelerator.reduce(total, "sum"))


@torch.no_grad()
def validation_nll(run: Run) -> float | None:
    """Returns the NLL in nats a labelled token of the validation rows, or None where there are none."""
    if not run.data.validation:
        return None
    accelerator = run.accelerator
    run.loss.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    mine = rank_share(range(len(run.data.validation)), accelerator.process_index, accelerator.num_processes)
    for pack in pack_rows([run.data.validation[at] for at in mine], run.config.optim.micro_batch_tokens):
        with accelerator.autocast():
            sums[0] += run.loss(pack.to(accelerator.device))
        sums[1] += pack.labelled
    nll, labelled = accelerator.reduce(sums, "sum").tolist()
    return float(nll / labelled)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, step, rank]).encode()).digest()[:7], "big")


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on its GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
