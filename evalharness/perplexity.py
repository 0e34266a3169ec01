"""Perplexity over HTTP: the log-probability an arm gives the reference reply, under the server's own template."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evalharness.chat import failure, invalid_reply
from evalharness.client import Client, Reply
from evalharness.records import Record, RecordKind, SampleStatus
from evalharness.samples import Message, Sample

# Two replies without a common first or last token: what their chats share at the end is the template's.
PROBE_REPLIES = ("Apple", "7")
PROBE = Sample(id="probe", messages=(Message(role="user", content="Name one thing."),), reference=PROBE_REPLIES[0])
MINUS_INFINITY = -9999.0  # what vLLM sends for it


class _WireTokens(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    tokens: tuple[int, ...]


class _WireLogprobs(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    token_logprobs: tuple[float | None, ...]


class _WireChoice(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    logprobs: _WireLogprobs


class _WireCompletion(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    choices: tuple[_WireChoice, ...] = Field(min_length=1)
    model: str | None = None
    system_fingerprint: str | None = None


class _Unscored(Exception):
    """Carries the reply that gave nothing to score, its reason inside."""

    def __init__(self, reply: Reply, invalid: str | None = None) -> None:
        super().__init__(invalid or reply.error)
        self.reply, self.invalid = reply, invalid


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The ids a template puts after a reply; the first is the end-of-turn token."""

    suffix: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """The scored positions of a chat's ids: the reply and its end-of-turn token."""

    start: int
    stop: int


def turn_end(first: Sequence[int], second: Sequence[int]) -> TurnEnd | None:
    """Returns the common end of two chats that differ only in the reply, or None where there is none."""
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return TurnEnd(tuple(first[len(first) - length :])) if length else None


def reply_span(prompt_ids: Sequence[int], chat_ids: Sequence[int], end: TurnEnd) -> Span:
    """Raises ValueError where the chat does not start with the prompt or does not end as every turn does."""
    if tuple(chat_ids[: len(prompt_ids)]) != tuple(prompt_ids):
        raise ValueError("the chat's ids do not start with the prompt's: this template rewrites earlier text")
    stop = len(chat_ids) - len(end.suffix) + 1
    if tuple(chat_ids[stop - 1 :]) != end.suffix or stop <= len(prompt_ids):
        raise ValueError("the chat's ids do not end with the template's end of turn")
    return Span(len(prompt_ids), stop)


def reply_nll(token_logprobs: Sequence[float | None], span: Span) -> float:
    """Returns nats over the span. Raises ValueError where a position has no finite log-probability."""
    if len(token_logprobs) != span.stop:
        raise ValueError(f"{len(token_logprobs)} log-probabilities for {span.stop} prompt tokens")
    scored = token_logprobs[span.start : span.stop]
    for position, logprob in enumerate(scored, start=span.start):
        if logprob is None or not math.isfinite(logprob) or logprob <= MINUS_INFINITY:
            raise ValueError(f"position {position} has log-probability {logprob}")
    return -math.fsum(logprob for logprob in scored if logprob is not None)


async def find_turn_end(client: Client, arm: str) -> TurnEnd | Reply:
    """Asks the server how `arm`'s turns end, and for one score; returns the failed reply where it cannot."""
    try:
        chats = [await _tokenize(client, arm, _finished(PROBE, text), prompt=False) for text in PROBE_REPLIES]
        end = turn_end(*chats)
        if end is None:
            return Reply(SampleStatus.UNAVAILABLE, error="the template puts no token after a reply")
        await _score(client, PROBE, arm, end)
    except _Unscored as error:
        return _unavailable(error)
    return end


async def score_reference(client: Client, sample: Sample, arm: str, end: TurnEnd | Reply) -> Record:
    """Returns the record of the reference reply's NLL; where the probe failed, a row that says why."""
    if isinstance(end, Reply):
        return failure(RecordKind.NLL, sample.id, arm, end)
    try:
        return await _score(client, sample, arm, end)
    except _Unscored as error:
        return failure(RecordKind.NLL, sample.id, arm, error.reply, error.invalid)


async def _score(client: Client, sample: Sample, arm: str, end: TurnEnd) -> Record:
    prompt_ids = await _tokenize(client, arm, list(sample.messages), prompt=True)
    chat_ids = await _tokenize(client, arm, _finished(sample, sample.reference or ""), prompt=False)
    try:
        span = reply_span(prompt_ids, chat_ids, end)
    except ValueError as error:
        raise _Unscored(Reply(SampleStatus.INVALID_REPLY), str(error)) from error
    sent = list(chat_ids[: span.stop])
    body = {"model": arm, "prompt": sent, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0.0}
    reply = await client.post("/v1/completions", body)
    if reply.body is None:
        raise _Unscored(reply)
    try:
        completion = _WireCompletion.model_validate(reply.body)
        nll_nats = reply_nll(completion.choices[0].logprobs.token_logprobs, span)
    except ValueError as error:  # pydantic's ValidationError is one
        raise _Unscored(reply, invalid_reply(error) if isinstance(error, ValidationError) else str(error)) from error
    return Record(
        kind=RecordKind.NLL,
        sample_id=sample.id,
        arm=arm,
        status=SampleStatus.OK,
        nll_nats=nll_nats,
        nll_tokens=span.stop - span.start,
        scored_sha256=_ids_sha256(sent[span.start :]),
        latency_s=reply.latency_s,
        tries=reply.tries,
        model=completion.model,
        system_fingerprint=completion.system_fingerprint,
        request_id=reply.request_id,
        http_status=reply.http_status,
    )


async def _tokenize(client: Client, arm: str, messages: list[Message], *, prompt: bool) -> tuple[int, ...]:
    chat = [message.model_dump() for message in messages]
    reply = await client.post("/tokenize", {"model": arm, "messages": chat, "add_generation_prompt": prompt})
    if reply.body is None:
        raise _Unscored(replace(reply, error=f"/tokenize: {reply.error}"))
    try:
        return _WireTokens.model_validate(reply.body).tokens
    except ValidationError as error:
        raise _Unscored(reply, f"/tokenize: {invalid_reply(error)}") from error


def _finished(sample: Sample, text: str) -> list[Message]:
    return [*sample.messages, Message(role="assistant", content=text)]


def _unavailable(error: _Unscored) -> Reply:
    """A refused or malformed probe means that the server cannot score at all; a lost one may pass later."""
    status = error.reply.status
    lasting = error.invalid is not None or status is SampleStatus.REFUSED or error.reply.http_status == 501
    return replace(error.reply, status=SampleStatus.UNAVAILABLE if lasting else status, body=None, error=str(error))


def _ids_sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
