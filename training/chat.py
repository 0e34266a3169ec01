"""Renders chats to token ids: the one place where a chat template is applied, for training and for serving."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from training.errors import TrainingError

Role = Literal["system", "user", "assistant"]
IGNORED_LABEL = -100  # torch's cross-entropy skips this label

# LLaMA-Factory's `qwen` template adds Qwen2.5's system prompt, whatever the model's own template says.
QWEN_SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class TemplateError(TrainingError):
    """A chat that the model's template cannot render, or a template that training cannot use."""


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


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


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    chat_template: Any
    added_tokens_decoder: Mapping[int, Any]

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def encode(self, text: str, **kwargs: Any) -> list[int]: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


def template_hash(tokenizer: Tokenizer) -> str:
    """Returns the sha256 of the template's text; equal hashes render equal prompts."""
    return hashlib.sha256(_template_text(tokenizer).encode()).hexdigest()


def default_system_prompt(tokenizer: Tokenizer) -> str | None:
    """Returns the system text that the template adds when a chat has none, or None."""
    probe = "graft-probe"
    alone = _render(tokenizer, (Message("user", probe),), generation_prompt=False)
    chat = (Message("system", "S" + probe), Message("user", probe))
    try:
        with_system = _render(tokenizer, chat, generation_prompt=False)
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


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[int, ...]:
    """Returns the ids a model continues to answer `messages`; control tokens inside a content stay plain text.

    Raises TemplateError where the template refuses the chat.
    """
    return _render_ids(tokenizer, messages, generation_prompt=True)


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[int, ...]:
    """Returns the ids of a finished chat, without a generation prompt. Raises TemplateError as `render_prompt` does."""
    return _render_ids(tokenizer, messages, generation_prompt=False)


def render_example(
    tokenizer: Tokenizer, messages: Sequence[Message], cutoff: int | None = None, *, label_turn_tail: bool = False
) -> TrainExample:
    """Returns the training ids of a chat: every assistant text and its end-of-turn token is labelled.

    `label_turn_tail` also labels what the template puts after that token (LLaMA-Factory trains ChatML's newline).
    A chat over `cutoff` tokens loses content from its longest messages, never headers or end-of-turn tokens; the
    end of a shortened reply is not labelled, since no one wrote it. Raises TemplateError where the chat has no reply,
    where no content is left to cut, and for templates whose prompt is not a prefix of the finished chat.
    """
    kept, lost, cut = list(messages), 0, set[int]()
    example = _label(tokenizer, kept, cut, label_turn_tail)
    while cutoff is not None and len(example.input_ids) > cutoff:
        index = _longest(tokenizer, kept)
        removed = _shorten(tokenizer, kept, index, len(example.input_ids) - cutoff)
        if not removed:
            raise TemplateError(
                f"{len(messages)} messages need more than {cutoff} tokens without any content; raise cutoff"
            )
        lost, cut = lost + removed, cut | {index}
        example = _label(tokenizer, kept, cut, label_turn_tail)
    return TrainExample(example.input_ids, example.labels, lost)


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the tokenizer's special tokens, text to id."""
    return {str(token.content): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def with_default_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Returns the chat with `system` in front where it has no system message."""
    if system is None or (messages and messages[0].role == "system"):
        return tuple(messages)
    return (Message("system", system), *messages)


def _label(tokenizer: Tokenizer, messages: Sequence[Message], cut: set[int], tail: bool) -> TrainExample:
    ids = render_chat(tokenizer, messages)
    labels = [IGNORED_LABEL] * len(ids)
    replies = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not replies:
        raise TemplateError("the chat has no assistant message to train on")
    controls = set(control_tokens(tokenizer).values())
    for index in replies:
        start, end, turn_end = _reply_span(tokenizer, messages, index, ids, controls)
        if index in cut:
            end -= 1
        elif tail:
            end = turn_end
        labels[start:end] = ids[start:end]
    return TrainExample(ids, tuple(labels))


def _reply_span(
    tokenizer: Tokenizer, messages: Sequence[Message], index: int, ids: tuple[int, ...], controls: set[int]
) -> tuple[int, int, int]:
    """Returns where the reply's text begins, and where its end-of-turn token and its whole turn end, in positions."""
    prompt = render_prompt(tokenizer, messages[:index])
    turn = ids if index == len(messages) - 1 else render_chat(tokenizer, messages[: index + 1])
    if ids[: len(prompt)] != prompt or ids[: len(turn)] != turn:
        raise TemplateError(
            f"the template rewrites earlier text once message {index} is there: the prompt a server would render is "
            "not a prefix of the training example, so what is trained would not be what is served"
        )
    # Templates may put text after the end-of-turn token (ChatML: a newline) that the model never has to produce.
    end = next((at + 1 for at in range(len(turn) - 1, len(prompt) - 1, -1) if ids[at] in controls), None)
    if end is None or str(tokenizer.decode(list(ids[end : len(turn)]))).strip():
        raise TemplateError(
            f"the template ends message {index} with no control token, so a model could not learn to stop"
        )
    return len(prompt), end, len(turn)


def _longest(tokenizer: Tokenizer, messages: Sequence[Message]) -> int:
    sizes = [len(_encode(tokenizer, _escape(tokenizer, message.content))) for message in messages]
    return max(range(len(sizes)), key=sizes.__getitem__)


def _shorten(tokenizer: Tokenizer, messages: list[Message], index: int, excess: int) -> int:
    """Cuts about `excess` tokens off the end of one message's content, in place; returns the tokens it lost."""
    message = messages[index]

    def size(length: int) -> int:
        return len(_encode(tokenizer, _escape(tokenizer, message.content[:length])))

    whole = size(len(message.content))
    # Searched over characters: cutting decoded ids would break characters, and decoders may change white space.
    length = bisect_right(range(1, len(message.content) + 1), max(whole - excess, 0), key=size)
    messages[index] = Message(message.role, message.content[:length])
    return whole - size(length)


# Text is cut at this character when it is encoded. It is put inside a control token's text in a content, so that only
# the template's own control tokens remain. It is a Unicode noncharacter: no text may carry it.
_MARK = "\ufdd0"
_NEAR = 8  # characters of a reply that can change how its header is split


def _escape(tokenizer: Tokenizer, content: str) -> str:
    content = content.replace(_MARK, "")
    for text in control_tokens(tokenizer):
        if text in content and len(text) == 1:
            raise TemplateError(f"a message contains {text!r}, which this tokenizer has as a control token; remove it")
        while text in content:  # again where a token's text overlaps itself
            content = content.replace(text, text[0] + _MARK + text[1:])
    return content


def _render(tokenizer: Tokenizer, messages: Sequence[Message], *, generation_prompt: bool) -> str:
    _template_text(tokenizer)
    chat = [{"role": message.role, "content": _escape(tokenizer, message.content)} for message in messages]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # templates raise what they like, jinja2's errors among them
        raise TemplateError(f"the chat template refused the messages: {error}") from error
    return cast(str, text)


def _render_ids(tokenizer: Tokenizer, messages: Sequence[Message], *, generation_prompt: bool) -> tuple[int, ...]:
    text = _render(tokenizer, messages, generation_prompt=generation_prompt)
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant":
            try:
                prompt = _render(tokenizer, messages[:index], generation_prompt=True)
            except TemplateError:  # no prompt can end here, such as before a chat's first message
                continue
            if text.startswith(prompt) and _must_cut(tokenizer, prompt, text[len(prompt) :]):
                text = prompt + _MARK + text[len(prompt) :]
    return _encode(tokenizer, text)


def _must_cut(tokenizer: Tokenizer, prompt: str, rest: str) -> bool:
    """Returns whether a reply and the header before it would share a token (ChatML's newline and the reply's own).

    No prompt ends inside a token, so there the ids are those of the prompt and then those of the reply.
    """
    if rest[:1].isspace():
        return True
    header = prompt[max((0, *(prompt.rfind(text) for text in control_tokens(tokenizer)))) :]
    near = rest[:_NEAR].partition(_MARK)[0]
    ids = _encode(tokenizer, header)
    return _encode(tokenizer, header + near)[: len(ids)] != ids


def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Encodes as the tokenizer itself does, but for the cuts at marks."""
    first, *rest = text.split(_MARK)
    ids = tokenizer.encode(first, add_special_tokens=False, split_special_tokens=False)
    # Behind a control token, which is dropped again, no tokenizer takes a piece for the beginning of a text.
    anchor = _anchor(tokenizer) if rest else ""
    for piece in rest:
        behind = tokenizer.encode(anchor + piece, add_special_tokens=False, split_special_tokens=False)
        ids += behind[1:] if anchor else behind
    return tuple(ids)


def _anchor(tokenizer: Tokenizer) -> str:
    """Returns the text of a control token that leaves white space after it alone, "" where there is none."""
    controls = (token for token in tokenizer.added_tokens_decoder.values() if token.special and not token.rstrip)
    return next((str(token.content) for token in controls), "")


def _template_text(tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several named templates: Hugging Face applies the one named default
        template = template.get("default")
    if not isinstance(template, str) or not template.strip():
        raise TemplateError(
            "the tokenizer has no chat template; choose an instruct model, or add chat_template.jinja beside it"
        )
    return template
