"""The training data: a recipe's rows as valid conversations, the report on the rest, and their rendering."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from training.chat import QWEN_SYSTEM_PROMPT, Tokenizer, TrainExample, Turns, render_example, with_default_system
from training.config import DataConfig
from training.rows import Conversation, DataError, Row, RowProblem, detect_layout, to_conversation
from training.sources import Source, load_rows

_SHOWN = 10  # problems listed one by one in a report


@dataclass(frozen=True, slots=True)
class Dataset:
    name: str
    conversations: tuple[Conversation, ...]
    problems: tuple[RowProblem, ...]  # one for each row left out


def load_dataset(config: DataConfig) -> Dataset:
    """Reads and checks every row. Raises DataError where none is valid, and where one is not and `strict` is set."""
    source = load_rows(config)
    conversations: list[Conversation] = []
    problems: list[RowProblem] = []
    for checked in _check_rows(source):
        if isinstance(checked, Conversation):
            conversations.append(checked)
        else:
            problems.append(checked)
    dataset = Dataset(source.name, tuple(conversations), tuple(problems))
    if not conversations:
        raise DataError(f"{row_report(dataset)}\nno row is left to train on; mend the rows, or set data.format")
    if config.strict and problems:
        raise DataError(f"{row_report(dataset)}\ndata.strict allows no bad row; mend them, or leave strict off")
    return dataset


def row_report(dataset: Dataset) -> str:
    """Returns how many rows are used and which are not: the first ones each, then counts by field and reason."""
    used, rejected = len(dataset.conversations), len(dataset.problems)
    lines = [f"{dataset.name}: {used + rejected} rows, {used} used, {rejected} rejected"]
    lines += [f"  {problem}" for problem in dataset.problems[:_SHOWN]]
    rest = Counter(f"{problem.field}: {problem.reason}" for problem in dataset.problems[_SHOWN:]).most_common()
    lines += [f"  and {count} more: {kind}" for kind, count in rest[:_SHOWN]]
    others = sum(count for _, count in rest[_SHOWN:])
    return "\n".join([*lines, f"  and {others} more of other kinds"] if others else lines)


def render_conversation(
    tokenizer: Tokenizer,
    conversation: Conversation,
    template: Literal["model", "qwen"],
    cutoff: int | None,
    turns: Turns = "all",
) -> TrainExample:
    """Returns the row's training ids. `qwen` renders as LLaMA-Factory does: its system prompt, the turn's tail trained.

    Raises TemplateError as `render_example` does.
    """
    qwen = template == "qwen"
    messages = with_default_system(conversation.messages, QWEN_SYSTEM_PROMPT) if qwen else conversation.messages
    return render_example(tokenizer, messages, cutoff, label_turn_tail=qwen, turns=turns)


def _check_rows(source: Source) -> Iterator[Conversation | RowProblem]:
    """Yields each row checked; where the source does not tell the layout, the first row that shows one does."""
    rows, layout, before = source.rows, source.layout, list[Row | RowProblem]()
    while layout is None:
        row = next(rows, None)
        if row is None:
            break
        before.append(row)
        layout = detect_layout(row.value) if isinstance(row, Row) else None
    for row in chain(before, rows):
        if isinstance(row, RowProblem):
            yield row
        elif layout is None:
            yield RowProblem(row.number, row.line, "row", "has no instruction and output, conversations or messages")
        else:
            yield to_conversation(row, layout)
