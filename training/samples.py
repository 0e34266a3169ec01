"""Samples: what the model in training answers to a recipe's prompts, at a few steps of the run."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training.batch import join_rows
from training.chat import (
    QWEN_SYSTEM_PROMPT,
    Message,
    TrainExample,
    end_of_turn_id,
    render_prompt,
    with_default_system,
)
from training.config import TrainConfig
from training.log import read_log
from training.model import PackLoss
from training.run import Run

JSONL_NAME, MARKDOWN_NAME = "samples.jsonl", "samples.md"
_SHOWN = 60  # characters of a sample in the progress line


@dataclass(frozen=True, slots=True)
class Sample:
    """The greedy completion of one prompt after `step` optimizer steps."""

    step: int
    prompt: str
    completion: str
    finished: bool  # False: cut at run.sample_tokens


class SampleLog:
    """Owns `samples.jsonl` and `samples.md` of one run; a resumed run drops the samples after its checkpoint."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self.folder = folder
        lines = read_log(folder / JSONL_NAME) if resume_step else []
        self.samples = [Sample(**line) for line in lines if line["step"] <= resume_step]

    def add(self, samples: Sequence[Sample]) -> None:
        self.samples += samples
        lines = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in self.samples)
        for name, text in ((JSONL_NAME, lines), (MARKDOWN_NAME, self._markdown())):
            temporary = self.folder / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.folder / name)

    def _markdown(self) -> str:
        lines = ["# Samples during training", ""]
        for prompt in dict.fromkeys(sample.prompt for sample in self.samples):
            lines += ["## Prompt", "", *_quoted(prompt), ""]
            for sample in self.samples:
                if sample.prompt == prompt:
                    end = "" if sample.finished else " (cut)"
                    lines += [f"After step {sample.step}{end}:", "", *_quoted(sample.completion), ""]
        return "\n".join(lines)


def open_samples(run: Run, done: int) -> SampleLog | None:
    """Returns the log of a run that is to go on after step `done`; None in all processes but the first."""
    if not run.accelerator.is_main_process:
        return None
    if done == 0:
        for name in (JSONL_NAME, MARKDOWN_NAME):
            (run.out / name).unlink(missing_ok=True)
    return SampleLog(run.out, done)


def take_samples(run: Run, log: SampleLog | None, step: int) -> None:
    """Completes the recipe's prompts, adds them to `log` and prints one line; without a log it only computes, as the
    other processes of several do, so that none waits long for the first.

    Draws no random number and changes no weight, so the run is the same bytes with and without samples.
    """
    settings, tokenizer, begun = run.config.run, run.tokenizer, time.monotonic()
    if not settings.sample_prompts:
        return
    prompts = prompts_of(run.config, tokenizer)
    completions = greedy(run, prompts, settings.sample_tokens)
    if log is None:
        return
    end = end_of_turn_id(tokenizer)
    log.add(
        [
            Sample(step, prompt, tokenizer.decode(ids, skip_special_tokens=True), ids[-1:] == [end])
            for prompt, ids in zip(settings.sample_prompts, completions, strict=True)
        ]
    )
    first = " ".join(log.samples[-len(prompts)].completion.split())
    shown = first if len(first) <= _SHOWN else first[: _SHOWN - 1] + "…"
    print(f'samples after step {step}, in {time.monotonic() - begun:.1f} s: "{shown}"', file=sys.stderr, flush=True)


def prompts_of(config: TrainConfig, tokenizer: Any) -> list[tuple[int, ...]]:
    """Returns the ids of the recipe's prompts, as they are served."""
    system = QWEN_SYSTEM_PROMPT if config.data.template == "qwen" else None
    chats = [with_default_system((Message("user", prompt),), system) for prompt in config.run.sample_prompts]
    return [render_prompt(tokenizer, chat) for chat in chats]


@torch.no_grad()
def greedy(run: Run, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Returns each prompt's likeliest next tokens, up to and with the end-of-turn token, `limit` at most.

    Each token is a pass over all rows without a cache: for so few tokens most of a pass is unpacking the base's
    weights, and the network is the very one that is trained.
    """
    network = run.network.eval()
    end, found = end_of_turn_id(run.tokenizer), [list[int]() for _ in prompts]
    for _ in range(limit):
        open_rows = [at for at, ids in enumerate(found) if ids[-1:] != [end]]
        if not open_rows:
            break
        for at, token in zip(
            open_rows, _next_tokens(run, network, [[*prompts[at], *found[at]] for at in open_rows]), strict=True
        ):
            found[at].append(token)
    return found


def _next_tokens(run: Run, network: PackLoss, rows: Sequence[Sequence[int]]) -> list[int]:
    pack = join_rows([TrainExample(tuple(row), tuple(row)) for row in rows]).to(run.accelerator.device)
    ends = torch.tensor(pack.row_lengths, device=pack.input_ids_T.device).cumsum(0) - 1
    with run.accelerator.autocast():
        hidden_ND = network.hidden(pack)[ends]
    head_VD = run.peft_model.get_base_model().get_output_embeddings().weight
    return [int(token) for token in (hidden_ND @ head_VD.to(hidden_ND.dtype).T).argmax(-1)]


def _quoted(text: str) -> list[str]:
    """Returns the text as a Markdown code block, fenced by more backticks than it has in a row."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return [fence + "text", text, fence]
