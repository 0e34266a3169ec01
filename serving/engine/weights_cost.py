"""The cost of a number format: how far a base's predictions of fixed replies move from those of its plain weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from serving.engine.engine import WeightsCost
from training.chat import IGNORED_LABEL, Message, Tokenizer, render_example

# N scored position, V vocabulary
_CHATS = (  # prose, a list, code, numbers, another language: rounding hurts some kinds of text more than others
    (
        "Why does the moon change its shape?",
        "It does not: the sun always lights one half of it. As the moon goes around the earth we see more or less of "
        "that half, from a thin sickle to the full disc and back within a month.",
    ),
    ("Give me three uses for an old jar.", "1. Keep nails and screws in it.\n2. Grow basil.\n3. Make a lantern."),
    (
        "Write a Python function that counts the vowels in a text.",
        'def count_vowels(text: str) -> int:\n    return sum(letter in "aeiou" for letter in text.lower())',
    ),
    ("A train goes 240 km in 3 hours. How fast is it?", "Its speed is 240 / 3 = 80 kilometres an hour."),
    ("How do I say good evening in French?", "You say « bonsoir ». To a group: « bonsoir à tous »."),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A finished chat's ids, and the position of its reply's first token."""

    ids: tuple[int, ...]
    start: int


def read_rows(model_dir: Path) -> tuple[Row, ...]:
    """Returns the fixed chats, rendered by the model's own template."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return tuple(_render(tokenizer, question, reply) for question, reply in _CHATS)


def predictions(logits_TV: torch.Tensor, row: Row) -> torch.Tensor:
    """Returns the log-probabilities over the vocabulary for each token of the reply: NV in float64."""
    return logits_TV[row.start - 1 : -1].double().log_softmax(-1)


def measure_cost(plain: Sequence[torch.Tensor], kept: Sequence[torch.Tensor], rows: Sequence[Row]) -> WeightsCost:
    """Compares the predictions of the plain weights with those of what is kept of them, each NV, row by row."""
    plain_NV, kept_NV = torch.cat(list(plain)), torch.cat(list(kept))
    ids_N = torch.tensor([token for row in rows for token in row.ids[row.start :]], device=plain_NV.device)
    difference_NV = plain_NV - kept_NV
    return WeightsCost(
        tokens=len(ids_N),
        kl_nats=float((plain_NV.exp() * difference_NV).sum(-1).mean()),
        top1_agreement=float((plain_NV.argmax(-1) == kept_NV.argmax(-1)).double().mean()),
        nll_nats=float(difference_NV.gather(1, ids_N[:, None]).mean()),
    )


def _render(tokenizer: Tokenizer, question: str, reply: str) -> Row:
    example = render_example(tokenizer, (Message("user", question), Message("assistant", reply)))
    labelled = [at for at, label in enumerate(example.labels) if label != IGNORED_LABEL]
    return Row(example.input_ids[: labelled[-1] + 1], labelled[0])
