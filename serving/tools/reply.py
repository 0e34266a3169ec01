"""The reply with calls: what a stream's deltas gain, and the whole that they fold to."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from serving.engine.engine import FinishReason
from serving.tools.offer import Offer
from serving.tools.parser import CallArguments, CallBegin, CallBroken, CallParser, Content, Event


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str  # JSON text


@dataclass(frozen=True, slots=True)
class Reply:
    """`content` is None where there are calls and no text."""

    content: str | None
    calls: tuple[Call, ...]
    finish_reason: str


def read_reply(offer: Offer, text: str, reason: FinishReason) -> Reply:
    """Returns what a whole text says and calls; a malformed call is content."""
    parser = offer.parser()
    contents, calls = list[str](), list[Call]()
    for event in _events(parser, text, reason):
        match event:
            case Content(said):
                contents.append(said)
            case CallBegin(name):
                calls.append(Call(_new_id(), name, ""))
            case CallArguments(piece):
                calls[-1].arguments += piece
            case CallBroken(said):
                calls.pop()
                contents.append(said)
    content = "".join(contents)
    return Reply(content if content or not calls else None, tuple(calls), _finish(parser, reason))


class CallDeltas:
    """One choice's stream. What it has sent of a call that then breaks cannot be taken back: its rest is content."""

    def __init__(self, offer: Offer) -> None:
        self._parser = offer.parser()
        self._calls = 0

    def push(self, text: str, reason: FinishReason | None) -> list[dict[str, Any]]:
        """Returns the deltas that `text` adds; with the reason of the end, those that were held back too."""
        events = _events(self._parser, text, reason)
        return [self._delta(event) for event in events if not isinstance(event, CallBroken)]

    def finish_reason(self, reason: FinishReason) -> str:
        return _finish(self._parser, reason)

    def _delta(self, event: Content | CallBegin | CallArguments) -> dict[str, Any]:
        call: dict[str, Any]
        match event:
            case Content(text):
                return {"content": text}
            case CallBegin(name):
                self._calls += 1
                call = {"id": _new_id(), "type": "function", "function": {"name": name, "arguments": ""}}
            case CallArguments(text):
                call = {"function": {"arguments": text}}
        return {"tool_calls": [{"index": self._calls - 1, **call}]}


def _events(parser: CallParser, text: str, reason: FinishReason | None) -> list[Event]:
    events = parser.push(text)
    return events if reason is None else events + parser.end(truncated=reason is FinishReason.LENGTH)


def _finish(parser: CallParser, reason: FinishReason) -> str:
    """A client runs what ends with `tool_calls`, so a reply that a limit cut off, or with a broken call, does not."""
    called = reason is FinishReason.STOP and parser.whole and not parser.broken
    return "tool_calls" if called else reason.value


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
