"""The rendered data of a run: training and validation rows as token ids, and what was lost on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from training.artifact import DataSection
from training.chat import QWEN_SYSTEM_PROMPT, TemplateError, TrainExample, default_system_prompt
from training.config import DataConfig
from training.data import load_dataset, render_conversation, row_report
from training.data_gate.report import Checked, DataReport
from training.rows import Conversation, DataError
from training.split import SPLIT_RULE, NearDuplicate, dataset_sha256, near_duplicates, split_held_out

_SHOWN = 5  # leaks named one by one


@dataclass(frozen=True, slots=True)
class Prepared:
    """`validation` are the first held-out rows in their stable order, rendered as the training rows are."""

    train: tuple[TrainExample, ...]
    validation: tuple[TrainExample, ...]
    held_out: tuple[Conversation, ...]
    facts: DataSection
    train_numbers: tuple[int, ...]  # of the training rows in their data set, 1-based
    report: DataReport | None = None


def system_prompt(tokenizer: Any, data: DataConfig) -> str | None:
    """Returns the system text rendered where a chat has none: LLaMA-Factory's for `qwen`, else the template's own."""
    return QWEN_SYSTEM_PROMPT if data.template == "qwen" else default_system_prompt(tokenizer)


def prepare(
    tokenizer: Any,
    data: DataConfig,
    eval_rows: int,
    *,
    quiet: bool = False,
    report: Callable[[Checked], DataReport] | None = None,
) -> Prepared:
    """Reads, checks, splits and renders the recipe's rows, and prints the row report and any leakage.

    Raises DataError where no row is left to train on, for any bad row where `data.strict` is set, for leakage where
    `data.leakage` is "fail", and for a row the template cannot render.
    """
    dataset = load_dataset(data)
    whole, held_out = split_held_out(dataset.conversations, data.held_out)
    leaks = near_duplicates(whole, held_out)
    train = _without_leaks(whole, leaks, data)
    if not quiet:
        print(row_report(dataset), file=sys.stderr)
        _tell(leaks, data)
    examples = _render_all(tokenizer, train, data)
    dropped = len(whole) - len(train)
    facts = DataSection(
        dataset=data.dataset,
        sha256=dataset_sha256(dataset.conversations),
        rows_train=len(train),
        rows_held_out=len(held_out),
        rows_rejected=len(dataset.problems),
        tokens_lost=sum(example.lost_tokens for example in examples),
        split_rule=SPLIT_RULE + (f"; {dropped} training rows left out that repeat one of them" if dropped else ""),
    )
    checked = Checked(dataset, train, held_out, tuple(leaks), dropped, examples)
    return Prepared(
        examples,
        _render_all(tokenizer, held_out[:eval_rows], data),
        held_out,
        facts,
        tuple(conversation.number for conversation in train),
        report(checked) if report else None,
    )


def _without_leaks(
    train: tuple[Conversation, ...], leaks: Sequence[NearDuplicate], data: DataConfig
) -> tuple[Conversation, ...]:
    """Leaves the held-out rows as they are, so that evaluations stay comparable whatever the policy."""
    if leaks and data.leakage == "fail":
        shown = "\n".join(f"  {leak}" for leak in leaks[:_SHOWN])
        raise DataError(
            f"data.leakage = 'fail' allows no training row that repeats a held-out row; there are {len(leaks)}:\n"
            f"{shown}\nmend the rows, or set it to 'drop' or 'report'"
        )
    if data.leakage != "drop":
        return train
    leaking = {leak.train.number for leak in leaks}
    kept = tuple(conversation for conversation in train if conversation.number not in leaking)
    if not kept:
        raise DataError(
            f"each of the {len(train)} training rows of {data.dataset} repeats a held-out row, so data.leakage = "
            "'drop' leaves none; give other rows, lower data.held_out, or set it to 'report'"
        )
    return kept


def _tell(leaks: Sequence[NearDuplicate], data: DataConfig) -> None:
    if not leaks:
        return
    rows = len({leak.train.number for leak in leaks})
    dropped = data.leakage == "drop"
    fate = "are left out" if dropped else "flatter the evaluation (data.leakage = 'report')"
    print(f"{'' if dropped else 'warning: '}{rows} training rows repeat a held-out row and {fate}:", file=sys.stderr)
    print("\n".join(f"  {leak}" for leak in leaks[:_SHOWN]), file=sys.stderr)


def _render_all(tokenizer: Any, conversations: Sequence[Conversation], data: DataConfig) -> tuple[TrainExample, ...]:
    examples = []
    for conversation in conversations:
        try:
            examples.append(render_conversation(tokenizer, conversation, data.template, data.cutoff, data.turns))
        except TemplateError as error:
            raise DataError(f"{data.dataset}, row {conversation.number}: {error}") from error
    return tuple(examples)
