"""The micro-batch budget: how many tokens a forward pass packs, halved where memory runs out."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from training.chat import TrainExample
from training.errors import TrainingError
from training.run import Run

_Result = TypeVar("_Result")


class MemoryLimitError(TrainingError):
    """Memory ran out and the packs cannot shrink; names what can be lowered."""


def within_memory(run: Run, examples: Sequence[TrainExample], attempt: Callable[[int], _Result]) -> _Result:
    """Returns `attempt(budget)`; out of memory, it halves the run's budget, for later steps too, and repeats.

    `attempt` packs `examples` into at most `budget` tokens each and starts from scratch, so a repeat changes no result
    but rounding. Raises MemoryLimitError where the longest row is a pack alone already, and with several processes:
    the others wait in their all-reduce.
    """
    while True:
        try:
            return attempt(run.micro_batch_tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Outside of the handler: the error's traceback holds the tensors of the failed pass.
        smaller = _smaller(run, [len(example.input_ids) for example in examples], reason)
        print(
            f"out of memory with {run.micro_batch_tokens} tokens a forward pass; the step starts again with {smaller}, "
            f"as do later ones ({reason})",
            file=sys.stderr,
            flush=True,
        )
        run.micro_batch_tokens = smaller
        if graphs := run.network.graphs:
            graphs.restart(smaller)
        _free()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's allocator failed; the CPU's raises a plain RuntimeError, known by its text."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _smaller(run: Run, lengths: Sequence[int], reason: str) -> int:
    longest = max(lengths, default=0)
    used = min(run.micro_batch_tokens, sum(lengths))  # a budget beyond the whole step would be halved for nothing
    processes = run.accelerator.num_processes
    if processes == 1 and used > longest:
        return max(used // 2, longest)
    cannot = f"a row of {longest} tokens is a pack alone already" if used <= longest else f"{processes} processes run"
    raise MemoryLimitError(
        f"out of memory with {used} tokens a forward pass, and {cannot}: lower data.cutoff = {run.config.data.cutoff} "
        f"or optim.micro_batch_tokens = {run.micro_batch_tokens}, set run.gradient_checkpointing = 'on' or "
        f"model.quantisation = 'nf4', or take a device with more memory ({reason})"
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
