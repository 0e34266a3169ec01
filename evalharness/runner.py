"""Runner: asks every arm every sample, arms interleaved, and appends each outcome to the records."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from evalharness.chat import ask
from evalharness.client import Client, Reply
from evalharness.errors import EvalError, ServerError
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
from evalharness.revisions import AnswererWatch, served_revisions
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
    """Does what the directory's records lack, of the revisions that are served, which it writes into the header.

    Raises ServerError where the server is out of reach, RecordError where the directory holds something else.
    """
    served = await served_revisions(client, header.arms)
    open_run(directory, header.model_copy(update={"served": served}), prompts, held_out)
    with record_writer(directory) as writer:
        records = read_records(directory / RECORDS_NAME)
        done = {key for key, record in records.items() if record.status is SampleStatus.OK}

        def missing(kind: RecordKind, samples: Sequence[Sample]) -> list[Task]:
            return [task for task in interleave(kind, samples, header.arms) if task.key not in done]

        async def chat(task: Task) -> Record:
            return await ask(client, task.kind, task.sample, task.arm, header.sampling)

        crew = _Crew(writer, AnswererWatch(records.values()), concurrency, out)
        await crew.work("fixed prompts", missing(RecordKind.FIXED, prompts), chat)
        await crew.work("held-out", missing(RecordKind.HELD_OUT, held_out), chat)
        scoring = missing(RecordKind.NLL, held_out)
        ends = await _turn_ends(client, [arm for arm in header.arms if any(t.arm == arm for t in scoring)], out)
        await crew.work("perplexity", scoring, _scorer(client, ends))


def interleave(kind: RecordKind, samples: Sequence[Sample], arms: tuple[str, ...]) -> Iterator[Task]:
    """Yields every pair, sample by sample; the arms take turns in going first, so that none meets a warmer cache."""
    for number, sample in enumerate(samples):
        first = number % len(arms)
        yield from (Task(kind, sample, arm) for arm in (*arms[first:], *arms[:first]))


class _Crew:
    """Several workers on one list of tasks; gives up when the server is lost, or a record cannot be kept."""

    def __init__(self, writer: RecordWriter, watch: AnswererWatch, concurrency: int, out: TextIO) -> None:
        self._writer, self._watch, self._concurrency, self._out = writer, watch, concurrency, out
        self._lost_in_a_row = 0

    async def work(self, label: str, tasks: list[Task], work: Work) -> None:
        progress = Progress(label, len(tasks), self._out)
        queue = iter(tasks)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(tasks))):
                    group.create_task(self._worker(queue, work, progress))
        except ExceptionGroup as group_error:
            known = group_error.subgroup(EvalError)
            raise (known or group_error).exceptions[0] from group_error
        if self._lost_in_a_row >= LOST_AFTER:
            raise ServerError(
                f"the server stopped answering after {len(tasks) - len(list(queue))} of {len(tasks)} ({label}); "
                "start it again and repeat the command: it continues where it stopped"
            )

    async def _worker(self, queue: Iterator[Task], work: Work, progress: Progress) -> None:
        for task in queue:
            record = await work(task)
            self._writer.append(record)
            if change := self._watch.see(record):
                progress.note(f"warning: {change}")
            progress.advance(failed=record.status is not SampleStatus.OK)
            lost = record.status is SampleStatus.UNREACHABLE
            self._lost_in_a_row = self._lost_in_a_row + 1 if lost else 0
            if self._lost_in_a_row >= LOST_AFTER:
                return


async def _turn_ends(client: Client, arms: Sequence[str], out: TextIO) -> dict[str, TurnEnd | Reply]:
    progress = Progress("perplexity: how a turn ends", len(arms), out)
    ends: dict[str, TurnEnd | Reply] = {}
    for arm in arms:
        ends[arm] = await find_turn_end(client, arm)
        progress.advance(failed=isinstance(ends[arm], Reply))
    return ends


def _scorer(client: Client, ends: dict[str, TurnEnd | Reply]) -> Work:
    async def score(task: Task) -> Record:
        return await score_reference(client, task.sample, task.arm, ends[task.arm])

    return score
