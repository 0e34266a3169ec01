"""Renders chats to token ids: the one place where a chat template is applied, for training and for serving."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from training.template import Message as Message  # noqa: PLC0414 - all these are part of what this file gives
from training.template import Reader as Reader  # noqa: PLC0414
from training.template import Role as Role  # noqa: PLC0414
from training.template import TemplateError as TemplateError  # noqa: PLC0414
from training.template import Tokenizer as Tokenizer  # noqa: PLC0414
from training.template import ToolCall as ToolCall  # noqa: PLC0414
from training.template import control_tokens as control_tokens  # noqa: PLC0414
from training.template import reader_of as reader_of  # noqa: PLC0414
from training.template import template_text

Turns = Literal["all", "last"]  # of a chat, whose replies are trained
IGNORED_LABEL = -100  # torch's cross-entropy skips this label

# LLaMA-Factory's `qwen` template adds Qwen2.5's system prompt, whatever the model's own template says.
QWEN_SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@dataclass(frozen=True, slots=True)
class TrainExample:
    """One rendered row: `labels[i]` is `input_ids[i]` where it is trained, else -100; unshifted."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    lost_tokens: int = 0  # content tokens removed to fit the cutoff

    @property
    def labelled(self) -> int:
        """The number of positions that a causal model is trained to predict."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])


def template_hash(tokenizer: Tokenizer) -> str:
    """Returns the sha256 of the template's text; equal hashes render equal prompts."""
    return hashlib.sha256(template_text(tokenizer).encode()).hexdigest()


def default_system_prompt(tokenizer: Tokenizer) -> str | None:
    """Returns the system text that the template adds when a chat has none, or None."""
    probe = "graft-probe"
    reader = reader_of(tokenizer)
    alone = reader.render([Message("user", probe)], generation_prompt=False)
    chat = [Message("system", "S" + probe), Message("user", probe)]
    try:
        with_system = reader.render(chat, generation_prompt=False)
    except TemplateError:  # the template knows no system messages, so it adds none
        return None
    head, _, tail = with_system.partition("S" + probe)
    if alone.startswith(head) and alone.endswith(tail) and len(alone) > len(head) + len(tail):
        return alone[len(head) : len(alone) - len(tail)]
    return None


def end_of_turn_id(tokenizer: Tokenizer) -> int:
    """Returns the id of the control token that ends an assistant turn, which a server must stop at."""
    example = render_example(tokenizer, (Message("user", "graft-probe"), Message("assistant", "graft-probe")))
    return [label for label in example.labels if label != IGNORED_LABEL][-1]


def render_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[int, ...]:
    """Returns the ids a model continues to answer `messages`; control tokens inside a content stay plain text.

    `tools` are what the chat may call, in the form that transformers' templates take. Raises TemplateError where the
    template refuses the chat.
    """
    reader = reader_of(tokenizer, tools)
    return reader.ids(reader.escape_all(messages), generation_prompt=True)


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[int, ...]:
    """Returns the ids of a finished chat, without a generation prompt. Raises TemplateError as `render_prompt` does."""
    reader = reader_of(tokenizer, tools)
    return reader.ids(reader.escape_all(messages), generation_prompt=False)


def render_example(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    cutoff: int | None = None,
    *,
    label_turn_tail: bool = False,
    turns: Turns = "all",
) -> TrainExample:
    """Returns the training ids of a chat: every assistant text and its end-of-turn token is labelled.

    `turns="last"` labels the last one alone, for templates that rewrite earlier ones. `label_turn_tail` also labels
    what the template puts after that token (LLaMA-Factory trains ChatML's newline).
    A chat over `cutoff` tokens loses content from its longest messages, never headers or end-of-turn tokens; the
    end of a shortened reply is not labelled, since no one wrote it. Raises TemplateError where the chat has no reply,
    where no content is left to cut, and for templates whose prompt is not a prefix of the finished chat.
    """
    reader, kept, lost, cut = reader_of(tokenizer), list(messages), 0, set[int]()
    example = _label(reader, kept, cut, label_turn_tail, turns)
    while cutoff is not None and len(example.input_ids) > cutoff:
        index = _longest(reader, kept)
        removed = _shorten(reader, kept, index, len(example.input_ids) - cutoff)
        if not removed:
            raise TemplateError(
                f"{len(messages)} messages need more than {cutoff} tokens without any content; raise cutoff"
            )
        lost, cut = lost + removed, cut | {index}
        example = _label(reader, kept, cut, label_turn_tail, turns)
    return TrainExample(example.input_ids, example.labels, lost)


def with_default_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Returns the chat with `system` in front where it has no system message."""
    if system is None or (messages and messages[0].role == "system"):
        return tuple(messages)
    return (Message("system", system), *messages)


def _label(reader: Reader, messages: Sequence[Message], cut: set[int], tail: bool, turns: Turns) -> TrainExample:
    chat = reader.escape_all(messages)
    ids = reader.ids(chat, generation_prompt=False)
    labels = [IGNORED_LABEL] * len(ids)
    replies = [index for index, message in enumerate(chat) if message.role == "assistant"]
    if not replies:
        raise TemplateError("the chat has no assistant message to train on")
    for index in replies if turns == "all" else replies[-1:]:
        start, end, turn_end = _reply_span(reader, chat, index, ids)
        if index in cut:
            end -= 1
        elif tail:
            end = turn_end
        labels[start:end] = ids[start:end]
    return TrainExample(ids, tuple(labels))


def _reply_span(reader: Reader, chat: Sequence[Message], index: int, ids: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns where the reply's text begins, and where its end-of-turn token and its whole turn end, in positions."""
    prompt = reader.ids(chat[:index], generation_prompt=True)
    turn = ids if index == len(chat) - 1 else reader.ids(chat[: index + 1], generation_prompt=False)
    if ids[: len(prompt)] != prompt or ids[: len(turn)] != turn:
        later = any(message.role == "assistant" for message in chat[index + 1 :])
        raise TemplateError(
            f"the template rewrites earlier text once message {index} is there: the prompt a server would render is "
            f"not a prefix of what is trained{'; to train the last reply of a chat alone: --data.turns last' * later}"
        )
    # Templates may put text after the end-of-turn token (ChatML: a newline) that the model never has to produce.
    controls = set(reader.controls.values())
    end = next((at + 1 for at in range(len(turn) - 1, len(prompt) - 1, -1) if ids[at] in controls), None)
    if end is None or str(reader.tokenizer.decode(list(ids[end : len(turn)]))).strip():
        raise TemplateError(
            f"the template ends message {index} with no control token, so a model could not learn to stop"
        )
    return len(prompt), end, len(turn)


def _longest(reader: Reader, messages: Sequence[Message]) -> int:
    return max(range(len(messages)), key=lambda at: len(reader.encode(reader.escape(messages[at].content))))


def _shorten(reader: Reader, messages: list[Message], index: int, excess: int) -> int:
    """Cuts about `excess` tokens off the end of one message's content, in place; returns the tokens it lost."""
    message = messages[index]

    def size(length: int) -> int:
        return len(reader.encode(reader.escape(message.content[:length])))

    whole = size(len(message.content))
    # Searched over characters: cutting decoded ids would break characters, and decoders may change white space.
    length = bisect_right(range(1, len(message.content) + 1), max(whole - excess, 0), key=size)
    messages[index] = replace(message, content=message.content[:length])
    return whole - size(length)
