"""The held-out split: stable by content, and the rows it would leak."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.rows import Conversation, DataError
from training.words import normalise, words

SPLIT_RULE = "the first held_out rows by sha256 of the normalised user text; equal user texts stay together"

_PROMPT_GRAM, _REPLY_GRAM = 3, 5  # words
_FEW_GRAMS = 4  # fewer than these shared by chance prove nothing: "what is the" is a whole short prompt's gram


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """`containment`: the share of the held-out row's word n-grams that the training row has too, 0 to 1."""

    train: Conversation
    held_out: Conversation
    part: str  # "prompt" or "reply"
    containment: float

    @property
    def exact(self) -> bool:
        """Whether that part is the same in both rows but for case, width and white space."""
        sides = [row.prompt_text if self.part == "prompt" else row.reply_text for row in (self.train, self.held_out)]
        return normalise(sides[0]) == normalise(sides[1])

    def __str__(self) -> str:
        share = f"{self.containment:.0%} of held-out row {self.held_out.number}'s {self.part}"
        return f"{share} is in training row {self.train.number}"


def split_held_out(
    conversations: Sequence[Conversation], held_out: int
) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
    """Returns (train, held out): the same rows for the same data set, in whatever order it comes.

    Rows of one user text fall on one side. Training rows keep their order; held-out rows are in hash order, so any
    first part of them is a fair sample. Raises DataError where no training row would be left.
    """
    groups: dict[str, list[Conversation]] = defaultdict(list)
    for conversation in conversations:
        groups[_prompt_hash(conversation)].append(conversation)
    kept: list[Conversation] = []
    chosen: set[str] = set()
    for key in sorted(groups):
        if len(kept) + len(groups[key]) <= held_out:
            kept += sorted(groups[key], key=_content)
            chosen.add(key)
    train = tuple(conversation for conversation in conversations if _prompt_hash(conversation) not in chosen)
    if not train or len(kept) < held_out:
        raise DataError(
            f"data.held_out = {held_out} cannot be taken from {len(conversations)} rows with {len(groups)} different "
            "prompts and leave rows to train on; lower it, or give more rows"
        )
    return train, tuple(kept)


def dataset_sha256(conversations: Iterable[Conversation]) -> str:
    """Returns the sha256 over the chats in their order, whatever file format they came from."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(_content(conversation).encode() + b"\n")
    return digest.hexdigest()


def write_held_out(path: Path, conversations: Iterable[Conversation]) -> None:
    """Writes one JSON object a line: id, the messages before the last reply, and that reply as the reference."""
    seen: Counter[str] = Counter()
    with path.open("w", encoding="utf-8") as file:
        for conversation in conversations:
            name = hashlib.sha256(_content(conversation).encode()).hexdigest()[:16]
            seen[name] += 1  # a row that stands twice
            *messages, reply = conversation.messages
            line = {
                "id": name if seen[name] == 1 else f"{name}-{seen[name]}",
                "messages": [{"role": message.role, "content": message.content} for message in messages],
                "reference": reply.content,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def near_duplicates(
    train: Iterable[Conversation], held_out: Sequence[Conversation], threshold: float = 0.6
) -> list[NearDuplicate]:
    """Returns the pairs whose prompts (word 3-grams) or replies (word 5-grams) overlap by `threshold` or more."""
    index: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    sizes: dict[tuple[str, int], int] = {}
    for number, conversation in enumerate(held_out):
        for part, grams in _parts(conversation):
            sizes[part, number] = max(len(grams), _FEW_GRAMS)
            for gram in grams:
                index[gram].append((part, number))
    found = []
    for conversation in train:
        shared = Counter(hit for part, grams in _parts(conversation) for gram in grams for hit in index.get(gram, ()))
        for (part, number), count in shared.items():
            if count / sizes[part, number] >= threshold:
                found.append(NearDuplicate(conversation, held_out[number], part, count / sizes[part, number]))
    return found


def _parts(conversation: Conversation) -> Iterator[tuple[str, set[tuple[str, ...]]]]:
    for part, text, size in (
        ("prompt", conversation.prompt_text, _PROMPT_GRAM),
        ("reply", conversation.reply_text, _REPLY_GRAM),
    ):
        found = words(text)
        yield part, {tuple(found[start : start + size]) for start in range(len(found) - size + 1)}


def _prompt_hash(conversation: Conversation) -> str:
    return hashlib.sha256(normalise(conversation.prompt_text).encode()).hexdigest()


def _content(conversation: Conversation) -> str:
    return json.dumps([[message.role, message.content] for message in conversation.messages], ensure_ascii=False)
