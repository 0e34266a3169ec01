from __future__ import annotations

import asyncio

import pytest

from evalharness.chat import ask
from evalharness.client import Client
from evalharness.records import Record, RecordKind, SampleStatus, SamplingSettings
from tests.evalharness.endpoint import Answer, samples, serve


def answer_of(answer: Answer) -> tuple[Record, dict]:
    bodies = []

    def handle(path, body):
        bodies.append(body)
        return answer

    async def once(url: str) -> Record:
        async with Client(url, timeout_s=5) as client:
            return await ask(client, RecordKind.HELD_OUT, samples(1)[0], "starter", SamplingSettings(seed=3))

    with serve(handle) as url:
        return asyncio.run(once(url)), bodies[0]


def reply(content) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


def test_every_sampling_field_is_sent_and_greedy():
    _, body = answer_of(Answer(reply("x")))
    assert body["model"] == "starter"
    assert (body["temperature"], body["top_p"], body["n"], body["seed"], body["stream"]) == (0, 1, 1, 3, False)
    assert (body["presence_penalty"], body["frequency_penalty"], body["max_tokens"]) == (0, 0, 256)


def test_a_bare_reply_without_the_optional_fields_is_fine():
    record, _ = answer_of(Answer(reply("Hello.")))
    assert (record.status, record.completion, record.system_fingerprint) == (SampleStatus.OK, "Hello.", None)


def test_what_answered_is_kept():
    extra = {"model": "starter@abc", "system_fingerprint": "fp", "usage": {"completion_tokens": 4, "other": 1}}
    record, _ = answer_of(Answer(reply("x") | extra, headers={"x-request-id": "r9"}))
    assert (record.model, record.system_fingerprint, record.request_id) == ("starter@abc", "fp", "r9")
    assert record.usage is not None
    assert record.usage.completion_tokens == 4


HALF_A_PAIR = b'{"choices": [{"message": {"content": "\\ud800"}}]}'


@pytest.mark.parametrize("body", [{}, {"choices": []}, reply(None), HALF_A_PAIR])
def test_a_reply_without_text_is_a_row_that_says_what_it_lacks(body):
    record, _ = answer_of(Answer(body))
    assert record.status is SampleStatus.INVALID_REPLY
    assert record.completion is None
    assert record.error
    assert "choices" in record.error
    record.model_dump_json()


def test_an_empty_reply_is_a_reply():
    record, _ = answer_of(Answer(reply("")))
    assert (record.status, record.completion) == (SampleStatus.OK, "")
