"""The call format: how a chat template writes a function call, learnt from what it writes of a probe.

So what is read out of replies is what the template itself would write of them, and no list of models is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from serving.errors import UnsupportedField
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel
from training.chat import Message, Reader, TemplateError, Tokenizer, ToolCall, reader_of, with_default_system

_NAME, _CITY, _ID, _RESULT = "graft_probe", "graft_probe_city", "graft-probe-1", "graft_probe_result"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "graft probe",
        "parameters": {"type": "object", "properties": {_CITY: {"type": "string"}}, "required": [_CITY]},
    },
}
_FIRST, _SECOND = ({_CITY: value} for value in ("graft-one", "graft-two"))
_REMEDY = "describe the functions in a message, and hold the reply to a JSON Schema by response_format"
_KNOWN = (
    'a call is known as {"name": ..., "arguments" or "parameters": {...}}, alone or between two marks of plain text '
    "such as <tool_call> and </tool_call>"
)
MAX_SHOWN = 120  # characters of a call that is not understood


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A call is `before`, the name, `between`, the arguments as a JSON object, `after`.

    `gap` stands between two calls of one reply; None where the template can write one only. `opening` and `closing` are
    the marks around a call's JSON, "" where it stands alone; `mark_ids` has those that are one added token.
    """

    before: str
    between: str
    after: str
    gap: str | None
    opening: str
    closing: str
    arguments_key: str
    mark_ids: Mapping[str, int] = field(default_factory=dict)


def call_format(base: LoadedBase, model: ServedModel, param: str) -> CallFormat:
    """Raises UnsupportedField, naming `param`, where the model's template renders no tools, or in an unknown way."""
    reader = reader_of(base.tokenizer, (_TOOL,))
    asked = with_default_system([Message("user", "graft-probe")], model.system_prompt)
    try:
        prompt = reader.render(asked, generation_prompt=True)
        if _NAME not in prompt or _CITY not in prompt:
            raise _refused(model, param, "renders no tools, so it was trained to call none")
        written = _written(reader, asked, prompt, [_call(_FIRST)])
        form = _parsed(written)
        if form is None:
            how = f"as {written[:MAX_SHOWN]!r}" if written else "behind a control token, which no reply shows"
            raise _refused(model, param, f"writes a call {how}; {_KNOWN}")
        answered = (*asked, _said([_call(_FIRST)]), Message("tool", _RESULT, tool_call_id=_ID))
        if _RESULT not in reader.render(answered, generation_prompt=True):
            raise _refused(model, param, "renders no result of a call")
        return replace(form, gap=_gap(reader, asked, prompt, form), mark_ids=_mark_ids(base.tokenizer, form))
    except TemplateError as error:
        raise _refused(model, param, f"refuses a chat with a call: {error}") from error


def _refused(model: ServedModel, param: str, reason: str) -> UnsupportedField:
    return UnsupportedField(
        f"{param}: model {model.name!r} cannot call functions: its chat template {reason}; {_REMEDY}",
        param=param,
    )


def _call(arguments: dict[str, Any]) -> ToolCall:
    return ToolCall(_ID, _NAME, arguments)


def _said(calls: Sequence[ToolCall]) -> Message:
    return Message("assistant", "", tuple(calls))


def _written(reader: Reader, asked: Sequence[Message], prompt: str, calls: Sequence[ToolCall]) -> str:
    """Returns what a model has to write after `prompt` to make the calls, up to the control token that ends it."""
    whole = reader.render((*asked, _said(calls)), generation_prompt=False)
    if not whole.startswith(prompt):
        raise TemplateError("it rewrites the prompt once a call follows")
    ends = (whole.find(text, len(prompt)) for text in reader.controls)
    return whole[len(prompt) : min((end for end in ends if end >= 0), default=len(whole))]


def _parsed(written: str) -> CallFormat | None:
    """Returns the form of a call, None for any that is not known. Text before the opening mark is no part of it."""
    before, name, rest = written.partition(_NAME)
    between, arguments, after = rest.partition(json.dumps(_FIRST))
    start, end = before.find("{"), after.find("}") + 1
    try:
        call = json.loads(before[start:] + name + between + arguments + after[:end])
    except ValueError:
        return None
    key = next((key for key in ("arguments", "parameters") if call == {"name": _NAME, key: _FIRST}), None)
    opening, closing = "".join(before[:start].split()[-1:]), "".join(after[end:].split()[:1])
    if key is None or bool(opening) != bool(closing):
        return None
    before = before[before.rindex(opening, 0, start) if opening else start :]
    after = after[: after.index(closing, end) + len(closing)]
    return CallFormat(before, between, after, None, opening, closing, key)


def _mark_ids(tokenizer: Tokenizer, form: CallFormat) -> dict[str, int]:
    added = {str(token.content): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    return {mark: added[mark] for mark in (form.opening, form.closing) if mark in added}


def _gap(reader: Reader, asked: Sequence[Message], prompt: str, form: CallFormat) -> str | None:
    try:
        written = _written(reader, asked, prompt, [_call(_FIRST), _call(_SECOND)])
    except TemplateError:  # Llama 3.1's takes one call a message
        return None
    first, second = (
        form.before + _NAME + form.between + json.dumps(arguments) + form.after for arguments in (_FIRST, _SECOND)
    )
    gap, found, _ = written.partition(first)[2].partition(second)
    return gap if found and not gap.strip() else None
