"""The plan of a run: what it will need in memory, tokens and hours, told before it starts."""

from __future__ import annotations

import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from training.base import resolve_base
from training.base_shape import read_shape
from training.batch import step_rows
from training.config import TrainConfig
from training.log import clock
from training.memory import MemoryPlan, Place, plan_memory
from training.model import compute_dtype, load_tokenizer
from training.prepare import Prepared, prepare
from training.run import assemble, wants_recompute
from training.schedule import total_steps
from training.step import optimizer_step

_FORWARD_SHARE = 0.5  # of a training token's arithmetic that validation costs: no gradient of frozen weights is made


@dataclass(frozen=True, slots=True)
class Work:
    """What one device computes, were it alone."""

    steps: int
    tokens: int
    labelled: int
    largest_pack: int  # tokens
    largest_labelled: int  # of a pack, at the mean share
    validations: int
    validation_tokens: int  # of each


@dataclass(frozen=True, slots=True)
class Probe:
    """What the first steps measured."""

    steps: int
    peak_gib: float
    tokens_per_s: float
    largest_pack: int


@dataclass(frozen=True, slots=True)
class Plan:
    work: Work
    place: Place
    memory: MemoryPlan
    tokens_per_s: float | None  # given or probed
    probe: Probe | None
    peak_gib: float  # predicted, and corrected by the probe where there is one

    @property
    def hours(self) -> float | None:
        if self.tokens_per_s is None:
            return None
        validation = _FORWARD_SHARE * self.work.validations * self.work.validation_tokens
        return (self.work.tokens + validation) / self.tokens_per_s / 3600


def make_plan(
    config: TrainConfig, cache: Path, device: str, probe_steps: int = 0, tokens_per_s: float | None = None
) -> Plan:
    """Reads config.json, the weight files' headers and the rows; loads weights only to probe. `device`: cpu or cuda."""
    base = resolve_base(config.model, cache, weights=probe_steps > 0)
    shape = read_shape(base)
    data = prepare(load_tokenizer(base.directory), config.data, config.run.eval_rows)
    work = count_work(config, data)
    place = _place(config, torch.device(device))

    def memory(tokens: int) -> MemoryPlan:
        labelled = tokens * work.largest_labelled // work.largest_pack
        return plan_memory(shape, config.model, config.lora, config.optim, place, tokens, labelled)

    predicted = memory(work.largest_pack)
    if not probe_steps:
        return Plan(work, place, predicted, tokens_per_s, None, predicted.peak / 2**30)
    probe = run_probe(config, cache, data, probe_steps)
    missed = probe.peak_gib - memory(probe.largest_pack).peak / 2**30
    return Plan(work, place, predicted, probe.tokens_per_s, probe, predicted.peak / 2**30 + missed)


def count_work(config: TrainConfig, data: Prepared) -> Work:
    """Counts every step's tokens. A step that needs several packs fills its first to the budget, or nearly."""
    lengths = [len(example.input_ids) for example in data.train]
    labels = [example.labelled for example in data.train]
    steps = total_steps(len(lengths), config.optim)
    rows = [step_rows(len(lengths), config.optim.batch_size, config.run.seed, step) for step in range(steps)]
    sizes = [sum(lengths[row] for row in step) for step in rows]
    labelled = sum(labels[row] for step in rows for row in step)
    largest = min(max(sizes), max(config.optim.micro_batch_tokens, *lengths))
    validation = sum(len(example.input_ids) for example in data.validation)
    validations = 2 + (steps - 1) // config.run.eval_every  # before the first step, and after the last
    return Work(steps, sum(sizes), labelled, largest, largest * labelled // sum(sizes), validations, validation)


def run_probe(config: TrainConfig, cache: Path, data: Prepared, steps: int) -> Probe:
    """Makes the run's own first steps and discards them; the first, which warms up, counts only where it is alone."""
    with tempfile.TemporaryDirectory() as folder:
        run = assemble(config, Path(folder), cache, data)
        records = [optimizer_step(run, step) for step in range(min(steps, run.total))]
    timed = records[1:] or records
    seconds = sum(record.tokens / record.tokens_per_s for record in timed)
    largest = min(max(record.tokens for record in records), run.micro_batch_tokens)
    return Probe(len(records), records[-1].peak_gib, sum(record.tokens for record in timed) / seconds, largest)


def table(plan: Plan, config: TrainConfig) -> str:
    """Returns the plan as lines of a name and a value."""
    memory, work = plan.memory, plan.work
    weights = "NF4, the rest plain" if config.model.quantisation == "nf4" else f"{8 * plan.place.number_bytes} bit"
    recompute = "recomputed" if plan.place.recompute else "kept"
    rows: list[tuple[str, str]] = [
        ("steps", f"{work.steps:,} of {config.optim.batch_size} rows"),
        ("tokens", f"{work.tokens:,}, {work.labelled:,} of them trained"),
        ("largest pack", f"{work.largest_pack:,} tokens"),
        *([("program, rows, mapped files", _gib(memory.runtime + memory.mapped))] if memory.runtime else []),
        (f"weights ({weights})", _gib(memory.weights)),
        (f"adapter and optimizer (rank {config.lora.rank})", _gib(memory.adapter)),
        (f"activations ({recompute})", _gib(memory.activations)),
        ("loss chunk or first gradients", _gib(memory.working)),
        ("while loading", _gib(memory.runtime + memory.mapped + memory.loading)),
        ("predicted peak", _gib(memory.peak)),
    ]
    if plan.probe:
        rows += [(f"peak of {plan.probe.steps} probed steps", f"{plan.probe.peak_gib:.2f} GiB")]
        rows += [("peak, corrected", f"{plan.peak_gib:.2f} GiB")]
    rows += [("time", _time(plan))]
    return "\n".join(f"{name:<36}{value}" for name, value in rows)


def _time(plan: Plan) -> str:
    if plan.tokens_per_s is None or plan.hours is None:
        return "unknown without --probe STEPS or --tokens-per-s RATE"
    how = "probed" if plan.probe else "given"
    return f"{clock(plan.hours * 3600)} ({plan.hours:.2f} h) at {plan.tokens_per_s:,.0f} tokens/s, {how}, on one device"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _place(config: TrainConfig, device: torch.device) -> Place:
    absent = device.type == "cuda" and not torch.cuda.is_available()
    dtype = config.model.dtype
    number_bytes = 2 if absent and dtype == "auto" else compute_dtype(dtype, device).itemsize
    recompute = config.run.gradient_checkpointing != "off" if absent else wants_recompute(config, device)
    return Place(device.type, number_bytes, recompute, 0 if device.type == "cuda" else resident_bytes())


def resident_bytes() -> int:
    """Returns what this process holds now: its packages and the rows, before any weight."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(statm.read_text().split()[1]) * resource.getpagesize()
