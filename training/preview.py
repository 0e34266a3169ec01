"""The preview: rendered training examples with the trained tokens marked, to see what a recipe teaches."""

from __future__ import annotations

from itertools import groupby
from typing import TextIO

from training.chat import IGNORED_LABEL, Tokenizer, TrainExample
from training.config import TrainConfig, cache_dir, no_color
from training.data import load_dataset, render_conversation, row_report

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_OPEN, _CLOSE = "[[", "]]"  # where colour cannot be shown
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), 127) if chr(code) != "\n"}  # a row may not steer a terminal


def preview(config: TrainConfig, count: int, out: TextIO, tokenizer: Tokenizer | None = None) -> None:
    """Writes the row report and the first `count` examples: trained tokens in green, or in [[ ]] without colour.

    Raises DataError and TemplateError as training would.
    """
    dataset = load_dataset(config.data)
    tokenizer = tokenizer or _load_tokenizer(config)
    colour = out.isatty() and not no_color()
    out.write(row_report(dataset) + "\n")
    if config.data.turns == "last":
        out.write("data.turns = 'last': of each chat the last reply alone is trained\n")
    for conversation in dataset.conversations[:count]:
        data = config.data
        example = render_conversation(tokenizer, conversation, data.template, data.cutoff, data.turns)
        out.write(
            f"\n--- {conversation.where}: {len(example.input_ids)} tokens, {example.labelled} trained, "
            f"{example.lost_tokens} lost to the cutoff of {config.data.cutoff}\n"
        )
        out.write(mark(tokenizer, example, colour=colour) + "\n")


def mark(tokenizer: Tokenizer, example: TrainExample, *, colour: bool) -> str:
    """Returns the example's text, its labelled runs between marks; control characters are shown as \\x1b."""
    start, end = (_GREEN, _PLAIN) if colour else (_OPEN, _CLOSE)
    pieces = []
    for trained, run in groupby(
        zip(example.input_ids, example.labels, strict=True), lambda pair: pair[1] != IGNORED_LABEL
    ):
        ids = [token for token, _ in run]
        text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        shown = text.translate(_VISIBLE)
        pieces.append(f"{start}{shown}{end}" if trained else shown)
    return "".join(pieces)


def _load_tokenizer(config: TrainConfig) -> Tokenizer:
    from training.base import resolve_base
    from training.model import load_tokenizer  # torch: seconds that a given tokenizer saves

    loaded: Tokenizer = load_tokenizer(resolve_base(config.model, cache_dir()).directory)
    return loaded
