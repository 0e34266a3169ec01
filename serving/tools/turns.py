"""The earlier turns: the calls that an assistant made and their results, each where it belongs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from serving.errors import BadRequest
from serving.messages import ChatMessage

MAX_SHOWN = 64  # characters of an id


def texts_of(messages: Sequence[ChatMessage]) -> Iterator[str]:
    """Yields what a template renders of the messages."""
    for message in messages:
        yield message.content
        if message.tool_calls:
            yield from (call.function.arguments for call in message.tool_calls)


def check_calls(messages: Sequence[ChatMessage]) -> None:
    """Raises BadRequest for calls that no assistant made, and for a result without its call."""
    if not any(message.is_of_calls for message in messages):
        return
    made: list[str] = []  # by the last message that was no result
    for index, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            raise _misplaced(f"messages[{index}].tool_calls", message.role, "assistant")
        if message.role == "tool":
            _check_result(f"messages[{index}].tool_call_id", message.tool_call_id, made)
            continue
        if message.tool_call_id is not None:
            raise _misplaced(f"messages[{index}].tool_call_id", message.role, "tool")
        made = [call.id for call in message.tool_calls or ()]


def _misplaced(param: str, role: str, owner: str) -> BadRequest:
    return BadRequest(f"{param} stands in a message of role {role!r}; only role {owner!r} has it", param=param)


def _check_result(param: str, call_id: str | None, made: Sequence[str]) -> None:
    if call_id is None:
        raise BadRequest(
            f"{param} is required of role 'tool'; give the id of its call", param=param, code="missing_field"
        )
    if call_id not in made:
        known = ", ".join(each[:MAX_SHOWN] for each in made[:5]) or "no tool_calls"
        raise BadRequest(
            f"{param} {call_id[:MAX_SHOWN]!r} is the id of no call in the assistant's message before it, which has "
            f"{known}; give one of those",
            param=param,
        )
