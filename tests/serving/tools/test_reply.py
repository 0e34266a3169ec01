"""A stream's deltas fold to the reply, in OpenAI's form."""

from __future__ import annotations

import re

import pytest

from serving.engine.engine import FinishReason
from serving.tools.offer import Offer
from serving.tools.protocol import Tool, ToolChoice
from serving.tools.reply import CallDeltas, read_reply
from tests.serving.tools.templates import CLOCK, WEATHER
from tests.serving.tools.test_parser import HERMES, written

OFFER = Offer(HERMES, tuple(Tool.model_validate(tool) for tool in (WEATHER, CLOCK)), ToolChoice("auto"), True)
CALLS = "Well.\n" + written("get_weather", {"city": "Paris"}) + "\n" + written("clock", {})


def stream(text: str, reason: FinishReason) -> tuple[list[dict], str]:
    writer = CallDeltas(OFFER)
    deltas = [
        delta for at, each in enumerate(text) for delta in writer.push(each, reason if at == len(text) - 1 else None)
    ]
    return deltas, writer.finish_reason(reason)


def joined(deltas: list[dict]) -> tuple[str, list[tuple[str, str]]]:
    content, calls = "".join(delta.get("content", "") for delta in deltas), list[tuple[str, str]]()
    for (part,) in (delta["tool_calls"] for delta in deltas if "tool_calls" in delta):
        if "id" in part:
            assert part["index"] == len(calls)
            assert part["type"] == "function"
            assert re.fullmatch("call_[0-9a-f]{24}", part["id"])
            calls.append((part["function"]["name"], part["function"]["arguments"]))
        else:
            assert part.keys() == {"index", "function"}
            calls[part["index"]] = (calls[part["index"]][0], calls[part["index"]][1] + part["function"]["arguments"])
    return content, calls


@pytest.mark.parametrize(
    ("text", "reason", "finish"),
    [
        (CALLS, FinishReason.STOP, "tool_calls"),
        (CALLS, FinishReason.LENGTH, "length"),
        (CALLS[: CALLS.index("ris")], FinishReason.LENGTH, "length"),
        ("no call", FinishReason.STOP, "stop"),
        ("<tool_call>{}</tool_call>", FinishReason.STOP, "stop"),
        ("", FinishReason.STOP, "stop"),
    ],
)
def test_deltas_fold_to_the_reply(text, reason, finish):
    reply = read_reply(OFFER, text, reason)
    deltas, streamed = stream(text, reason) if text else (CallDeltas(OFFER).push("", reason), finish)
    assert joined(deltas) == (reply.content or "", [(call.name, call.arguments) for call in reply.calls])
    assert reply.finish_reason == streamed == finish


def test_content_is_null_only_beside_calls():
    assert read_reply(OFFER, written("clock", {}), FinishReason.STOP).content is None
    assert read_reply(OFFER, "", FinishReason.STOP).content == ""
    assert read_reply(OFFER, CALLS, FinishReason.STOP).content == "Well."


def test_a_call_that_breaks_after_it_began_is_content_and_ends_no_stream_as_a_call():
    text = written("clock", {}) + written("clock", {"a": 1}).replace("1}", "1]")
    reply = read_reply(OFFER, text, FinishReason.STOP)
    assert [call.arguments for call in reply.calls] == ["{}"]
    assert reply.content == text[len(written("clock", {})) :]
    assert stream(text, FinishReason.STOP)[1] == reply.finish_reason == "stop"


def test_ids_differ():
    reply = read_reply(OFFER, CALLS, FinishReason.STOP)
    assert len({call.id for call in reply.calls}) == 2
