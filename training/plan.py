"""The plan of a run: what it will need in memory, tokens and hours, told before it starts."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Sequence
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
from training.run import Run, assemble
from training.samples import greedy, prompts_of
from training.schedule import total_steps
from training.step import optimizer_step, peak_gib
from training.ways import choose_ways

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
    samplings: int  # times that the recipe's prompts are answered
    sampled_tokens: int  # of each, at most: every new token is a pass over the prompts and all before it
    largest_sampled: int  # tokens of the last of those passes


@dataclass(frozen=True, slots=True)
class Probe:
    """What the first steps measured."""

    steps: int
    peak_gib: float
    tokens_per_s: float
    largest_pack: int
    sampling_s: float | None  # of the recipe's prompts, answered to the full length; None: there are none


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
        return ((self.work.tokens + validation) / self.tokens_per_s + self.samplings_s) / 3600

    @property
    def samplings_s(self) -> float:
        """Seconds of all samples: as probed, else by their tokens, which leaves out what each short pass costs anew."""
        if self.probe is not None and self.probe.sampling_s is not None:
            return self.work.samplings * self.probe.sampling_s
        tokens = _FORWARD_SHARE * self.work.samplings * self.work.sampled_tokens
        return tokens / self.tokens_per_s if self.tokens_per_s else 0.0


def make_plan(
    config: TrainConfig, cache: Path, device: str, probe_steps: int = 0, tokens_per_s: float | None = None
) -> Plan:
    """Reads config.json, the weight files' headers and the rows; loads weights only to probe. `device`: cpu or cuda."""
    base = resolve_base(config.model, cache, weights=probe_steps > 0)
    shape = read_shape(base)
    tokenizer = load_tokenizer(base.directory)
    data = prepare(tokenizer, config.data, config.run.eval_rows)
    work = count_work(config, data, [len(prompt) for prompt in prompts_of(config, tokenizer)])
    place = _place(config, torch.device(device), work.steps)

    def memory(tokens: int) -> MemoryPlan:
        labelled = tokens * work.largest_labelled // work.largest_pack
        sampled = work.largest_sampled
        return plan_memory(shape, config.model, config.lora, config.optim, place, tokens, labelled, sampled)

    predicted = memory(work.largest_pack)
    if not probe_steps:
        return Plan(work, place, predicted, tokens_per_s, None, predicted.peak / 2**30)
    probe = run_probe(config, cache, data, probe_steps)
    missed = probe.peak_gib - memory(probe.largest_pack).peak / 2**30
    return Plan(work, place, predicted, probe.tokens_per_s, probe, predicted.peak / 2**30 + missed)


def count_work(config: TrainConfig, data: Prepared, prompts: Sequence[int] = ()) -> Work:
    """Counts every step's tokens. A step that needs several packs fills its first to the budget, or nearly.

    `prompts` are the lengths of those that are sampled.
    """
    lengths = [len(example.input_ids) for example in data.train]
    labels = [example.labelled for example in data.train]
    steps = total_steps(len(lengths), config.optim)
    rows = [step_rows(len(lengths), config.optim.batch_size, config.run.seed, step) for step in range(steps)]
    sizes = [sum(lengths[row] for row in step) for step in rows]
    labelled = sum(labels[row] for step in rows for row in step)
    largest = min(max(sizes), max(config.optim.micro_batch_tokens, *lengths))
    validation = sum(len(example.input_ids) for example in data.validation)
    validations = 2 + (steps - 1) // config.run.eval_every  # before the first step, and after the last
    new, every = config.run.sample_tokens, config.run.sample_every or config.run.eval_every
    return Work(
        steps=steps,
        tokens=sum(sizes),
        labelled=labelled,
        largest_pack=largest,
        largest_labelled=largest * labelled // sum(sizes),
        validations=validations,
        validation_tokens=validation,
        samplings=2 + (steps - 1) // every if prompts else 0,
        sampled_tokens=sum(new * length + new * (new - 1) // 2 for length in prompts),
        largest_sampled=sum(length + new - 1 for length in prompts),
    )


def run_probe(config: TrainConfig, cache: Path, data: Prepared, steps: int) -> Probe:
    """Makes the run's own first steps and discards them; the first, which warms up, counts only where it is alone."""
    with tempfile.TemporaryDirectory() as folder:
        run = assemble(config, Path(folder), cache, data)
        records = [optimizer_step(run, step) for step in range(min(steps, run.total))]
        sampling_s = _time_sampling(run)
        peak = peak_gib(run.accelerator.device)
    timed = records[1:] or records
    seconds = sum(record.tokens / record.tokens_per_s for record in timed)
    largest = min(max(record.tokens for record in records), run.micro_batch_tokens)
    rate = sum(record.tokens for record in timed) / seconds
    return Probe(len(records), peak, rate, largest, sampling_s)


def _time_sampling(run: Run) -> float | None:
    """Returns the seconds of answering the recipe's prompts to the full length; an untrained reply may end before."""
    prompts, limit = prompts_of(run.config, run.tokenizer), run.config.run.sample_tokens
    if not prompts:
        return None
    begun = time.monotonic()
    made = max(map(len, greedy(run, prompts, limit)))
    return (time.monotonic() - begun) * limit / made


def table(plan: Plan, config: TrainConfig) -> str:
    """Returns the plan as lines of a name and a value."""
    memory, work = plan.memory, plan.work
    nf4 = config.model.quantisation == "nf4"
    weights = "NF4, the rest plain" if nf4 and not plan.place.dense else f"{8 * plan.place.number_bytes} bit"
    recompute = "recomputed" if plan.place.recompute else "kept"
    rows: list[tuple[str, str]] = [
        ("steps", f"{work.steps:,} of {config.optim.batch_size} rows"),
        ("tokens", f"{work.tokens:,}, {work.labelled:,} of them trained"),
        ("largest pack", f"{work.largest_pack:,} tokens"),
        *([("program, rows, mapped files", _gib(memory.runtime + memory.mapped))] if memory.runtime else []),
        (f"weights ({weights})", _gib(memory.weights)),
        (f"adapter and optimizer (rank {config.lora.rank})", _gib(memory.adapter)),
        (f"activations ({recompute})", _gib(memory.activations)),
        (
            "loss chunk, gradients or DoRA" if config.lora.dora else "loss chunk or first gradients",
            _gib(memory.working),
        ),
        ("while loading", _gib(memory.runtime + memory.mapped + memory.loading)),
        *([("samples, beside the model", _gib(memory.sampling))] if work.samplings else []),
        ("predicted peak", _gib(memory.peak)),
    ]
    if plan.probe:
        rows += [(f"peak of {plan.probe.steps} probed steps", f"{plan.probe.peak_gib:.2f} GiB")]
        rows += [("peak, corrected", f"{plan.peak_gib:.2f} GiB")]
    rows += [("time", _time(plan))]
    if work.samplings and plan.tokens_per_s is not None:
        rows += [("samples, in that", f"{clock(plan.samplings_s)} at most, {work.samplings} times")]
    return "\n".join(f"{name:<36}{value}" for name, value in rows)


def _time(plan: Plan) -> str:
    if plan.tokens_per_s is None or plan.hours is None:
        return "unknown without --probe STEPS or --tokens-per-s RATE"
    how = "probed" if plan.probe else "given"
    return f"{clock(plan.hours * 3600)} ({plan.hours:.2f} h) at {plan.tokens_per_s:,.0f} tokens/s, {how}, on one device"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _place(config: TrainConfig, device: torch.device, steps: int) -> Place:
    """A GPU that is not here is taken for one with little memory."""
    if device.type == "cuda" and not torch.cuda.is_available():
        number_bytes = 2 if config.model.dtype == "auto" else compute_dtype(config.model.dtype, device).itemsize
        recompute = config.run.gradient_checkpointing != "off"
        dense = config.model.quantisation == "nf4" and config.model.keep_dense == "on"
        return Place(device.type, number_bytes, recompute, 0, dense)
    dtype = compute_dtype(config.model.dtype, device)
    ways = choose_ways(config, dtype, device, steps=steps)
    runtime = 0 if device.type == "cuda" else resident_bytes()
    return Place(device.type, dtype.itemsize, ways.recompute, runtime, ways.dense)


def resident_bytes() -> int:
    """Returns what this process holds now: its packages and the rows, before any weight."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(statm.read_text().split()[1]) * resource.getpagesize()
