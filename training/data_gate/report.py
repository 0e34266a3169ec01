"""The data report: counts of what may be wrong with a data set, with the rows to look at, and its size in tokens."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from training.batch import pack_rows, step_rows
from training.chat import TrainExample, control_tokens
from training.config import TrainConfig
from training.data import Dataset
from training.data_gate.lengths import Lengths, measure
from training.data_gate.text import ends_mid_sentence, has_words, script_of
from training.data_gate.twins import SIMILARITY, find_twins
from training.rows import Conversation
from training.split import NearDuplicate
from training.words import normalise

_SHOWN = 20  # rows named for each finding
_FEW = 0.02  # the share of rows up to which a finding is no warning
# Control tokens of the common templates: in a user's text they are text here, but tell of a row pasted from a log.
_FOREIGN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]")


@dataclass(frozen=True, slots=True)
class Checked:
    """A data set on its way into training. `examples` are the rendered rows of `train`, which leaks have left."""

    dataset: Dataset
    train: tuple[Conversation, ...]
    held_out: tuple[Conversation, ...]
    leaks: tuple[NearDuplicate, ...]
    dropped: int  # training rows left out since they leak
    examples: tuple[TrainExample, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of trouble: how many rows have it, and the first of them in words."""

    name: str
    rows: int
    share: float  # of the rows it was looked for in
    examples: tuple[str, ...]
    warning: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of one epoch over the training rows."""

    total: int
    labelled: int
    lost: int  # to data.cutoff
    packs: int  # forward passes of one device
    pack_mean: float
    padded: int  # tokens that batches of optim.batch_size rows would hold, padded to their longest


@dataclass(frozen=True, slots=True)
class DataReport:
    dataset: str
    rows_read: int
    rows_train: int
    rows_held_out: int
    rows_dropped: int
    findings: tuple[Finding, ...]
    prompt_scripts: dict[str, int]
    reply_scripts: dict[str, int]
    prompt_tokens: Lengths  # all that is not trained, headers and system prompt too
    reply_tokens: Lengths
    tokens: Tokens


def build_report(checked: Checked, tokenizer: Any, config: TrainConfig) -> DataReport:
    """Looks at every row that was read; the token counts are of the training rows."""
    dataset, lengths = checked.dataset, [len(example.input_ids) for example in checked.examples]
    replies = [example.labelled for example in checked.examples]
    rows = dataset.conversations
    return DataReport(
        dataset=dataset.name,
        rows_read=len(rows) + len(dataset.problems),
        rows_train=len(checked.train),
        rows_held_out=len(checked.held_out),
        rows_dropped=checked.dropped,
        findings=tuple(_findings(checked, tokenizer)),
        prompt_scripts=dict(Counter(script_of(row.prompt_text) for row in rows).most_common()),
        reply_scripts=dict(Counter(script_of(row.reply_text) for row in rows).most_common()),
        prompt_tokens=measure([whole - reply for whole, reply in zip(lengths, replies, strict=True)]),
        reply_tokens=measure(replies),
        tokens=_tokens(checked.examples, config),
    )


def _findings(checked: Checked, tokenizer: Any) -> Iterator[Finding]:
    yield _rejected(checked.dataset)
    yield from _repetition(checked.dataset.conversations)
    yield from _leakage(checked)
    yield from _texts(checked, tokenizer)


def _rejected(dataset: Dataset) -> Finding:
    kinds = Counter(_kind(f"{problem.field}: {problem.reason}") for problem in dataset.problems)
    shown = [f"{times} x {kind}" for kind, times in kinds.most_common(_SHOWN)]
    total = len(dataset.conversations) + len(dataset.problems)
    return _finding("rejected rows", len(dataset.problems), total, shown, allowed=0)


def _repetition(rows: Sequence[Conversation]) -> Iterator[Finding]:
    repeats = _repeats(rows)
    yield _finding("exact duplicates of an earlier row", len(repeats), len(rows), repeats.values())
    twins = find_twins([row for row in rows if row.number not in repeats])
    shown = [f"row {twin.row} of row {twin.earlier} ({twin.similarity:.0%})" for twin in twins]
    yield _finding(f"near duplicates (at least {SIMILARITY:.0%} of word 3-grams)", len(twins), len(rows), shown)
    yield _several_replies(rows)


def _leakage(checked: Checked) -> Iterator[Finding]:
    allowed = 1.0 if checked.dropped else 0.0  # what is left out is no trouble any more
    for name, exact in (("exactly", True), ("nearly", False)):
        leaks = [leak for leak in checked.leaks if leak.exact is exact]
        rows, of = len({leak.train.number for leak in leaks}), len(checked.train) + checked.dropped
        yield _finding(f"training rows that repeat a held-out row {name}", rows, of, map(str, leaks), allowed)


def _texts(checked: Checked, tokenizer: Any) -> Iterator[Finding]:
    rows = checked.dataset.conversations
    yield _where(rows, "replies without a word", lambda row: not has_words(row.reply_text), allowed=0)
    yield _where(rows, "replies that end in mid-sentence", lambda row: ends_mid_sentence(row.reply_text))
    cut = {row.number for row, example in zip(checked.train, checked.examples, strict=True) if example.lost_tokens}
    yield _where(checked.train, "cut at data.cutoff", lambda row: row.number in cut)
    signs = [*dict.fromkeys([*control_tokens(tokenizer), *_FOREIGN])]
    yield _where(rows, "control tokens' text in a prompt", lambda row: any(sign in row.prompt_text for sign in signs))
    yield _where(
        rows,
        "prompt and reply in different scripts",
        lambda row: script_of(row.prompt_text) != script_of(row.reply_text),
        allowed=1,  # translations: to know, not to mend
    )


def _finding(name: str, rows: int, of: int, examples: Iterable[str], allowed: float = _FEW) -> Finding:
    share = rows / of if of else 0.0
    return Finding(name, rows, share, tuple(list(examples)[:_SHOWN]), share > allowed)


def _where(
    rows: Sequence[Conversation], name: str, has_it: Callable[[Conversation], bool], allowed: float = _FEW
) -> Finding:
    found = [row.where for row in rows if has_it(row)]
    return _finding(name, len(found), len(rows), found, allowed)


def _repeats(rows: Sequence[Conversation]) -> dict[int, str]:
    """Returns the rows whose normalised chat an earlier row has, by number, in words."""
    first: dict[tuple[tuple[str, str], ...], int] = {}
    found = {}
    for row in rows:
        key = tuple((message.role, normalise(message.content)) for message in row.messages)
        earlier = first.setdefault(key, row.number)
        if earlier != row.number:
            found[row.number] = f"row {row.number} of row {earlier}"
    return found


def _several_replies(rows: Sequence[Conversation]) -> Finding:
    replies = defaultdict[tuple[tuple[str, str], ...], dict[str, int]](dict)
    for row in rows:
        *before, reply = row.messages
        prompt = tuple((message.role, normalise(message.content)) for message in before)
        replies[prompt].setdefault(normalise(reply.content), row.number)
    groups = [list(found.values()) for found in replies.values() if len(found) > 1]
    shown = ["rows " + ", ".join(map(str, group)) for group in groups]
    return _finding("rows of one prompt with different replies", sum(map(len, groups)), len(rows), shown)


def _tokens(examples: Sequence[TrainExample], config: TrainConfig) -> Tokens:
    size, sizes, padded = config.optim.batch_size, list[int](), 0
    for step in range(-(-len(examples) // size)):
        batch = [examples[at] for at in step_rows(len(examples), size, config.run.seed, step)]
        sizes += [sum(pack.row_lengths) for pack in pack_rows(batch, config.optim.micro_batch_tokens)]
        padded += len(batch) * max(len(example.input_ids) for example in batch)
    return Tokens(
        total=sum(sizes),
        labelled=sum(example.labelled for example in examples),
        lost=sum(example.lost_tokens for example in examples),
        packs=len(sizes),
        pack_mean=sum(sizes) / len(sizes),
        padded=padded,
    )


def _kind(problem: str) -> str:
    """Leaves out where in the row, so that like problems count together."""
    return re.sub(r"(is not JSON).*", r"\1", re.sub(r"\[\d+\]", "[]", problem))
