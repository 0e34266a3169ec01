"""The rendered data of a run: training and validation rows as token ids, and what was lost on the way."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.artifact import DataSection
from training.chat import QWEN_SYSTEM_PROMPT, TemplateError, TrainExample, default_system_prompt
from training.config import DataConfig
from training.data import load_dataset, render_conversation, row_report
from training.rows import Conversation, DataError
from training.split import SPLIT_RULE, dataset_sha256, near_duplicates, split_held_out

_SHOWN = 5  # near-duplicates named one by one


@dataclass(frozen=True, slots=True)
class Prepared:
    """`validation` are the first held-out rows in their stable order, rendered as the training rows are."""

    train: tuple[TrainExample, ...]
    validation: tuple[TrainExample, ...]
    held_out: tuple[Conversation, ...]
    facts: DataSection
    train_numbers: tuple[int, ...]  # of the training rows in their data set, 1-based


def system_prompt(tokenizer: Any, data: DataConfig) -> str | None:
    """Returns the system text rendered where a chat has none: LLaMA-Factory's for `qwen`, else the template's own."""
    return QWEN_SYSTEM_PROMPT if data.template == "qwen" else default_system_prompt(tokenizer)


def prepare(tokenizer: Any, data: DataConfig, eval_rows: int, *, quiet: bool = False) -> Prepared:
    """Reads, checks, splits and renders the recipe's rows, and prints the row report and any leakage.

    Raises DataError where no row is left to train on, for any bad row where `data.strict` is set, and for a row the
    template cannot render.
    """
    dataset = load_dataset(data)
    train, held_out = split_held_out(dataset.conversations, data.held_out)
    if not quiet:
        print(row_report(dataset), file=sys.stderr)
        _warn_of_leakage(train, held_out)
    examples = _render_all(tokenizer, train, data)
    facts = DataSection(
        dataset=data.dataset,
        sha256=dataset_sha256(dataset.conversations),
        rows_train=len(train),
        rows_held_out=len(held_out),
        rows_rejected=len(dataset.problems),
        tokens_lost=sum(example.lost_tokens for example in examples),
        split_rule=SPLIT_RULE,
    )
    numbers = tuple(conversation.number for conversation in train)
    return Prepared(examples, _render_all(tokenizer, held_out[:eval_rows], data), held_out, facts, numbers)


def _warn_of_leakage(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> None:
    pairs = near_duplicates(train, held_out)
    if pairs:
        print(f"warning: {len(pairs)} near-duplicates across the split flatter the evaluation:", file=sys.stderr)
        print("\n".join(f"  {pair}" for pair in pairs[:_SHOWN]), file=sys.stderr)


def _render_all(tokenizer: Any, conversations: Sequence[Conversation], data: DataConfig) -> tuple[TrainExample, ...]:
    examples = []
    for conversation in conversations:
        try:
            examples.append(render_conversation(tokenizer, conversation, data.template, data.cutoff))
        except TemplateError as error:
            raise DataError(f"{data.dataset}, row {conversation.number}: {error}") from error
    return tuple(examples)
