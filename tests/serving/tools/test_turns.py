"""Calls and results of earlier turns stand where they belong."""

from __future__ import annotations

import pytest

from serving.errors import BadRequest
from serving.messages import ChatMessage
from serving.tools.turns import check_calls, texts_of
from tests.serving.bad_inputs import CALLING, RESULT

USER = {"role": "user", "content": "hi"}


def messages(*given: dict) -> list[ChatMessage]:
    return [ChatMessage.model_validate(each) for each in given]


def test_what_a_call_says_counts_to_the_chats_texts():
    assert list(texts_of(messages(USER, CALLING))) == ["hi", "", "{}"]


@pytest.mark.parametrize(
    "chat", [[USER], [CALLING, RESULT], [CALLING, RESULT, RESULT, USER], [CALLING, CALLING, RESULT], [CALLING]]
)
def test_a_result_after_its_call_passes(chat):
    check_calls(messages(*chat))


@pytest.mark.parametrize(
    ("chat", "field", "reason"),
    [
        ([RESULT], "tool_call_id", "'c1' is the id of no call .* has no tool_calls"),
        ([CALLING, USER, RESULT], "tool_call_id", "'c1' is the id of no call"),
        ([CALLING, {**RESULT, "tool_call_id": "c2"}], "tool_call_id", "'c2' is the id of no call .* has c1; give one"),
        ([CALLING, {"role": "tool", "content": "5"}], "tool_call_id", "is required of role 'tool'"),
        ([{**USER, "tool_call_id": ""}], "tool_call_id", "only role 'tool' has it"),
        ([{**CALLING, **USER}], "tool_calls", "only role 'assistant' has it"),
        ([CALLING, {**CALLING, **RESULT}], "tool_calls", "only role 'assistant' has it"),
    ],
)
def test_what_stands_elsewhere_is_refused_by_its_place(chat, field, reason):
    with pytest.raises(BadRequest, match=reason) as caught:
        check_calls(messages(*chat))
    assert caught.value.param == f"messages[{len(chat) - 1}].{field}"
