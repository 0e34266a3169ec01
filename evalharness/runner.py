"""Runner: asks every arm every sample, arms interleaved, and appends each outcome to the records."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from evalharness.chat import ask
from evalharness.client import Client, Reply
from evalharness.errors import ServerError
from evalharness.perplexity import TurnEnd, find_turn_end, score_reference
from evalharness.progress import Progress
from evalharness.records import (
    RECORDS_NAME,
    Record,
    RecordKey,
    RecordKind,
    RecordWriter,
    RunHeader,
    SampleStatus,
    open_run,
    read_records,
    record_writer,
)
from evalharness.samples import Sample

LOST_AFTER = 6  # requests in a row that found no server


@dataclass(frozen=True, slots=True)
class Task:
    kind: RecordKind
    sample: Sample
    arm: str

    @property
    def key(self) -> RecordKey:
        return RecordKey(self.kind, self.sample.id, self.arm)


Work = Callable[[Task], Awaitable[Record]]


async def run(
    directory: Path,
    header: RunHeader,
    prompts: tuple[Sample, ...],
    held_out: tuple[Sample, ...],
    client: Client,
    *,
    concurrency: int,
    out: TextIO,
) -> None:
    """Does what the directory's records lack. Raises ServerError where the server is out of reach."""
    await check_server(client, header.arms)
    open_run(directory, header, prompts, held_out)
    with record_writer(directory) as writer:
        records = read_records(directory / RECORDS_NAME)
        done = {key for key, record in records.items() if record.status is SampleStatus.OK}

        def missing(kind: RecordKind, samples: Sequence[Sample]) -> list[Task]:
            return [task for task in interleave(kind, samples, header.arms) if task.key not in done]

        async def chat(task: Task) -> Record:
            return await ask(client, task.kind, task.sample, task.arm, header.sampling)

        crew = _Crew(writer, concurrency, out)
        await crew.work("fixed prompts", missing(RecordKind.FIXED, prompts), chat)
        await crew.work("held-out", missing(RecordKind.HELD_OUT, held_out), chat)
        scoring = missing(RecordKind.NLL, held_out)
        ends = {arm: await find_turn_end(client, arm) for arm in header.arms if any(t.arm == arm for t in scoring)}
        await crew.work("perplexity", scoring, _scorer(client, ends))


def interleave(kind: RecordKind, samples: Sequence[Sample], arms: tuple[str, ...]) -> Iterator[Task]:
    """Yields every pair, sample by sample; the arms take turns in going first, so that none meets a warmer cache."""
    for number, sample in enumerate(samples):
        first = number % len(arms)
        yield from (Task(kind, sample, arm) for arm in (*arms[first:], *arms[:first]))


async def check_server(client: Client, arms: tuple[str, ...]) -> None:
    """Raises ServerError where nothing answers, or where the server lists models and knows no such arm."""
    reply = await client.get("/v1/models")
    if reply.status in {SampleStatus.UNREACHABLE, SampleStatus.TIMEOUT}:
        raise ServerError(f"--url {client.url}: no server answers ({reply.error}); start it, or give the right --url")
    if reply.http_status in {401, 403}:
        raise ServerError(f"--url {client.url}: {reply.error}; name the variable that holds the key with --api-key-env")
    known = _model_ids(reply)
    for arm in arms:
        # A server may answer to more names than it lists, so an unlisted one is asked for by name.
        if known and arm not in known and (await client.get(f"/v1/models/{quote(arm)}")).http_status == 404:
            raise ServerError(f"--arm {arm!r}: the server has no such model; it lists {', '.join(sorted(known))}")


class _Crew:
    """Several workers on one list of tasks; gives up when the server is lost."""

    def __init__(self, writer: RecordWriter, concurrency: int, out: TextIO) -> None:
        self._writer, self._concurrency, self._out = writer, concurrency, out
        self._lost_in_a_row = 0

    async def work(self, label: str, tasks: list[Task], work: Work) -> None:
        progress = Progress(label, len(tasks), self._out)
        queue = iter(tasks)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._concurrency, len(tasks))):
                group.create_task(self._worker(queue, work, progress))
        if self._lost_in_a_row >= LOST_AFTER:
            raise ServerError(
                f"the server stopped answering after {len(tasks) - len(list(queue))} of {len(tasks)} ({label}); "
                "start it again and repeat the command: it continues where it stopped"
            )

    async def _worker(self, queue: Iterator[Task], work: Work, progress: Progress) -> None:
        for task in queue:
            record = await work(task)
            self._writer.append(record)
            progress.advance(failed=record.status is not SampleStatus.OK)
            lost = record.status is SampleStatus.UNREACHABLE
            self._lost_in_a_row = self._lost_in_a_row + 1 if lost else 0
            if self._lost_in_a_row >= LOST_AFTER:
                return


def _scorer(client: Client, ends: dict[str, TurnEnd | Reply]) -> Work:
    async def score(task: Task) -> Record:
        return await score_reference(client, task.sample, task.arm, ends[task.arm])

    return score


def _model_ids(reply: Reply) -> set[str]:
    models = (reply.body or {}).get("data")
    if not isinstance(models, list):
        return set()
    return {str(model["id"]) for model in models if isinstance(model, dict) and "id" in model}
