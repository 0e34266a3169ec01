"""A chat template and its tokenizer: the text and the token ids of a chat, where contents stay plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

from training.errors import TrainingError

Role = Literal["system", "user", "assistant", "tool"]

# Text is cut at this character when it is encoded. It is put inside a control token's text in a content, so that only
# the template's own control tokens remain. It is a Unicode noncharacter: no text may carry it.
_MARK = "\ufdd0"
_NEAR = 8  # characters of a reply that can change how its header is split


class TemplateError(TrainingError):
    """A chat that the model's template cannot render, or a template that training cannot use."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant made; a message of role tool with its id carries the result."""

    id: str
    name: str  # letters, digits, _ and -
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None  # of role tool alone


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    chat_template: Any
    added_tokens_decoder: Mapping[int, Any]

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def encode(self, text: str, **kwargs: Any) -> list[int]: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the tokenizer's special tokens, text to id."""
    return {str(token.content): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


@dataclass(frozen=True, slots=True)
class Reader:
    """A tokenizer, and what one call reads of it once: each reading has the tokenizer build its control tokens anew.

    A chat is escaped once and then rendered as often as it takes.
    """

    tokenizer: Tokenizer
    controls: Mapping[str, int]  # text to id
    anchor: str  # the text of a control token that leaves white space after it alone, "" where there is none
    tools: Sequence[Mapping[str, Any]] = ()  # as the template takes them; escaped already

    def escape_all(self, messages: Sequence[Message]) -> list[Message]:
        return [self._escape_message(message) for message in messages]

    def _escape_message(self, message: Message) -> Message:
        calls = [
            ToolCall(self.escape(call.id), call.name, self.escape_json(call.arguments)) for call in message.tool_calls
        ]
        answers = message.tool_call_id and self.escape(message.tool_call_id)
        return Message(message.role, self.escape(message.content), tuple(calls), answers)

    def escape_json(self, value: Any) -> Any:
        """Returns the value with every text in it escaped, keys too."""
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, Mapping):
            return {self.escape(key): self.escape_json(each) for key, each in value.items()}
        return [self.escape_json(each) for each in value] if isinstance(value, list) else value

    def escape(self, content: str) -> str:
        """Breaks the texts of control tokens by marks. Raises TemplateError where one cannot be broken."""
        content = content.replace(_MARK, "")
        for text in self.controls:
            if text in content and len(text) == 1:
                raise TemplateError(
                    f"a message contains {text!r}, which this tokenizer has as a control token; remove it"
                )
            while text in content:  # again where a token's text overlaps itself
                content = content.replace(text, text[0] + _MARK + text[1:])
        return content

    def render(self, chat: Sequence[Message], *, generation_prompt: bool) -> str:
        """Returns the template's text; the contents of `chat` are escaped already."""
        options = {"tools": list(self.tools)} if self.tools else {}
        try:
            text = self.tokenizer.apply_chat_template(
                [_as_dict(message) for message in chat],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **options,
            )
        except Exception as error:  # templates raise what they like, jinja2's errors among them
            raise TemplateError(f"the chat template refused the messages: {error}") from error
        return cast(str, text)

    def ids(self, chat: Sequence[Message], *, generation_prompt: bool) -> tuple[int, ...]:
        """Renders and encodes; cuts where a reply would share a token with the header before it."""
        text = self.render(chat, generation_prompt=generation_prompt)
        pieces, end = list[str](), len(text)
        for prompt in self._prompts(chat):
            start = len(prompt)
            near = text[start : min(start + _NEAR, end)]
            if start <= end and text.startswith(prompt) and self._must_cut(prompt, near):
                pieces.append(text[start:end])
                end = start
        return self.encode(_MARK.join([text[:end], *reversed(pieces)]))

    def encode(self, text: str) -> tuple[int, ...]:
        """Encodes as the tokenizer itself does, but for the cuts at marks."""
        first, *rest = text.split(_MARK)
        ids = self.tokenizer.encode(first, add_special_tokens=False, split_special_tokens=False)
        for piece in rest:
            # Behind a control token, which is dropped again, no tokenizer takes a piece for the beginning of a text.
            behind = self.tokenizer.encode(self.anchor + piece, add_special_tokens=False, split_special_tokens=False)
            ids += behind[1:] if self.anchor else behind
        return tuple(ids)

    def _prompts(self, chat: Sequence[Message]) -> Iterator[str]:
        """Yields the text before each reply, the last reply's first, where a prompt can end there."""
        for index in range(len(chat) - 1, -1, -1):
            if chat[index].role == "assistant":
                try:
                    prompt = self.render(chat[:index], generation_prompt=True)
                except TemplateError:  # such as before a chat's first message
                    continue
                yield prompt

    def _must_cut(self, prompt: str, reply: str) -> bool:
        """Returns whether a reply and the header before it would share a token (ChatML's newline and the reply's own).

        No prompt ends inside a token, so there the ids are those of the prompt and then those of the reply.
        """
        near = reply.partition(_MARK)[0]
        if near[:1].isspace():
            return True
        start = 0
        for text in self.controls:
            start = max(start, prompt.rfind(text, start))
        header = prompt[start:]
        ids = self.encode(header)
        return self.encode(header + near)[: len(ids)] != ids


def reader_of(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] = ()) -> Reader:
    """`tools` are functions a chat may call. Raises TemplateError where the tokenizer has no chat template."""
    template_text(tokenizer)
    tokens = tokenizer.added_tokens_decoder.values()
    anchor = next((str(token.content) for token in tokens if token.special and not token.rstrip), "")
    reader = Reader(tokenizer, control_tokens(tokenizer), anchor)
    return replace(reader, tools=reader.escape_json(list(tools))) if tools else reader


def _as_dict(message: Message) -> dict[str, Any]:
    """Returns the message as templates read it: arguments are an object, not OpenAI's text of one."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def template_text(tokenizer: Tokenizer) -> str:
    """Returns the text of the tokenizer's own template. Raises TemplateError where there is none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several named templates: Hugging Face applies the one named default
        template = template.get("default")
    if not isinstance(template, str) or not template.strip():
        raise TemplateError(
            "the tokenizer has no chat template; choose an instruct model, or add chat_template.jinja beside it"
        )
    return template
