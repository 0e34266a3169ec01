"""Asks an arm one prompt and turns the outcome into a record."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evalharness.client import Client, Reply
from evalharness.records import Record, RecordKind, SampleStatus, SamplingSettings, Usage
from evalharness.samples import Sample


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _WireMessage(_Wire):
    content: str


class _WireChoice(_Wire):
    message: _WireMessage
    finish_reason: str | None = None


class _WireChat(_Wire):
    """What is needed of a chat completion; everything else is optional."""

    choices: tuple[_WireChoice, ...] = Field(min_length=1)
    usage: Usage | None = None
    model: str | None = None
    system_fingerprint: str | None = None


async def ask(client: Client, kind: RecordKind, sample: Sample, arm: str, sampling: SamplingSettings) -> Record:
    messages = [message.model_dump() for message in sample.messages]
    body = {"model": arm, "messages": messages, "stream": False, **sampling.model_dump()}
    reply = await client.post("/v1/chat/completions", body)
    if reply.body is None:
        return failure(kind, sample.id, arm, reply)
    try:
        chat = _WireChat.model_validate(reply.body)
    except ValidationError as error:
        return failure(kind, sample.id, arm, reply, invalid_reply(error))
    return Record(
        kind=kind,
        sample_id=sample.id,
        arm=arm,
        status=SampleStatus.OK,
        completion=chat.choices[0].message.content,
        finish_reason=chat.choices[0].finish_reason,
        usage=chat.usage,
        latency_s=reply.latency_s,
        tries=reply.tries,
        model=chat.model,
        system_fingerprint=chat.system_fingerprint,
        request_id=reply.request_id,
        http_status=reply.http_status,
    )


def failure(kind: RecordKind, sample_id: str, arm: str, reply: Reply, invalid: str | None = None) -> Record:
    """Returns the row of a request that gave nothing to score; `invalid` says what an HTTP 200 lacked."""
    return Record(
        kind=kind,
        sample_id=sample_id,
        arm=arm,
        status=SampleStatus.INVALID_REPLY if invalid else reply.status,
        latency_s=reply.latency_s,
        tries=reply.tries,
        request_id=reply.request_id,
        http_status=reply.http_status,
        error=invalid or reply.error,
    )


def invalid_reply(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"reply field {'.'.join(map(str, first['loc']))}: {first['msg']}"
