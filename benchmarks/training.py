"""Useful training tokens a second: packed rows as Graft trains them against stock padded batches, on the same rows.

    python -m benchmarks.training smollm2-starter --steps 3
    python -m benchmarks.training qwen2-7b-alpaca --model.id DIR --data.dataset FILE --steps 5 --peak-tflops 989

The stock arm is transformers + peft + bitsandbytes as most recipes drive them: 4 rows a micro-batch padded to the
longest, SDPA, logits over every position. Both arms start from the same adapter and take the same rows. `--warm-up`
steps over the rows that are counted later come first: they compile, and capture a CUDA graph for each size of pack,
where the recipe says so. Useful tokens are those of the rows, without padding. MFU counts 4 FLOP a weight and useful
token. `--memory-gib` caps what PyTorch may allocate on the GPU, as a smaller card would.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from benchmarks.machine import describe_machine
from training import attention
from training.batch import step_rows
from training.chat import IGNORED_LABEL, TrainExample
from training.config import cache_dir, load_recipe
from training.lora_linear import fuse_lora
from training.run import Run, assemble, take_ways
from training.step import optimizer_step, peak_gib

STOCK_MICRO_BATCH = 4  # rows


@dataclass(frozen=True, slots=True)
class Measured:
    tokens_per_s: list[float]
    peak_gib: float
    nll_nats: list[float]


def stock_step(run: Run, step: int) -> float:
    """One optimizer step over the same rows, padded; returns the mean NLL of its labelled tokens."""
    model, device = run.peft_model, run.accelerator.device
    rows = step_rows(len(run.data.train), run.config.optim.batch_size, run.config.run.seed, step)
    examples = [run.data.train[row] for row in rows]
    total = sum(example.labelled for example in examples)
    nll = 0.0
    model.train()
    for start in range(0, len(examples), STOCK_MICRO_BATCH):
        batch = {name: tensor.to(device) for name, tensor in pad(examples[start : start + STOCK_MICRO_BATCH]).items()}
        with run.accelerator.autocast():
            loss = model(**batch, use_cache=False, num_items_in_batch=total).loss
        run.accelerator.backward(loss)
        nll += float(loss.detach())
    run.accelerator.clip_grad_norm_(model.parameters(), run.config.optim.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return nll


def pad(examples: Sequence[TrainExample]) -> dict[str, torch.Tensor]:
    width = max(len(example.input_ids) for example in examples)

    def fill(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in values])

    return {
        "input_ids": fill([example.input_ids for example in examples], 0),
        "labels": fill([example.labels for example in examples], IGNORED_LABEL),
        "attention_mask": fill([[1] * len(example.input_ids) for example in examples], 0),
    }


def measure(run: Run, warm_up: int, steps: int, one_step: Callable[[int], float]) -> Measured:
    rates, losses = [], []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for number in range(warm_up + steps):
        step = number if number < warm_up else number - warm_up
        rows = step_rows(len(run.data.train), run.config.optim.batch_size, run.config.run.seed, step)
        tokens = sum(len(run.data.train[row].input_ids) for row in rows)
        begun = time.perf_counter()
        losses.append(one_step(step))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= warm_up:
            rates.append(tokens / (time.perf_counter() - begun))
    peak = peak_gib(run.accelerator.device)
    return Measured(rates, peak, losses)


def run_arms(run: Run, arms: Sequence[str], warm_up: int, steps: int) -> dict[str, Measured]:
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(run.peft_model).items()}
    fresh = deepcopy(run.optimizer.state_dict())
    results = {}
    for arm in arms:
        set_peft_model_state_dict(run.peft_model, start)
        run.optimizer.load_state_dict(fresh)
        gc.collect()
        torch.cuda.empty_cache()
        (as_stock if arm == "stock" else as_graft)(run)
        step = partial(stock_step, run) if arm == "stock" else partial(graft_step, run)
        results[arm] = measure(run, warm_up, steps, step)
    return results


def as_stock(run: Run) -> None:
    """Gives every module its own forward pass again: peft's, transformers' and PyTorch's attention."""
    run.peft_model.get_base_model().set_attn_implementation("sdpa")
    for module in run.peft_model.modules():
        module.__dict__.pop("forward", None)
        module._compiled_call_impl = None


def as_graft(run: Run) -> None:
    run.peft_model.get_base_model().set_attn_implementation(attention.NAME)
    fuse_lora(run.peft_model)
    take_ways(run.network, run.config, run.ways)


def graft_step(run: Run, step: int) -> float:
    return optimizer_step(run, step).nll_nats


def base_parameters(run: Run) -> int:
    """The weights that a token is multiplied with: all but the input embedding; a quantised byte holds two."""
    model: Any = run.peft_model.get_base_model()
    count: int = sum(
        parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
        for name, parameter in model.named_parameters()
        if "lora_" not in name and "embed_tokens" not in name
    )
    head: torch.Tensor = model.get_output_embeddings().weight
    return count + (head.numel() if head is model.get_input_embeddings().weight else 0)


def table(run: Run, results: dict[str, Measured], peak_tflops: float | None) -> str:
    lines = [
        "| arm | useful tok/s (median) | ratio | peak GiB | MFU | NLL of the first steps |",
        "|---|---|---|---|---|---|",
    ]
    first = statistics.median(next(iter(results.values())).tokens_per_s)
    flop = 4 * base_parameters(run)
    for arm, found in results.items():
        rate = statistics.median(found.tokens_per_s)
        mfu = f"{100 * rate * flop / (peak_tflops * 1e12):.1f} %" if peak_tflops else "-"
        losses = " ".join(f"{loss:.3f}" for loss in found.nll_nats[:4])
        lines.append(f"| {arm} | {rate:,.1f} | {rate / first:.2f} | {found.peak_gib:.1f} | {mfu} | {losses} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=3, help="counted optimizer steps an arm")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them")
    parser.add_argument("--memory-gib", type=float, help="of the GPU, that may be used")
    parser.add_argument("--arms", nargs="+", default=["stock", "graft"], choices=["stock", "graft"])
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the MFU column")
    arguments, overrides = parser.parse_known_args()
    config = load_recipe(arguments.recipe, overrides)
    if arguments.memory_gib is not None:
        whole = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(arguments.memory_gib / whole)
    with TemporaryDirectory() as folder:
        run = assemble(config, Path(folder), cache_dir())
        if run.ways.dense and "stock" in arguments.arms:
            parser.error("the stock arm computes with quantised weights: give --model.keep_dense off")
        results = run_arms(run, arguments.arms, arguments.warm_up, arguments.steps)
    print(describe_machine().line)
    print(
        f"{config.model.id}, {config.optim.batch_size} rows a step, packs of {config.optim.micro_batch_tokens} tokens"
    )
    print(table(run, results, arguments.peak_tflops))


if __name__ == "__main__":
    main()
