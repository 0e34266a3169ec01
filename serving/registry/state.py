"""The registry's state on disk: one SQLite file, changed in whole transactions by the process that holds its lock."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from serving.errors import GraftError
from serving.registry.change import Change
from serving.registry.revision import Label, ProbeResult, Reference, Refusal, Revision, RevisionStatus
from serving.registry.routing import Policy

T = TypeVar("T")
SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE revisions (
    name TEXT NOT NULL, digest TEXT NOT NULL, status TEXT NOT NULL, created REAL NOT NULL, rank INTEGER NOT NULL,
    manifest_sha256 TEXT NOT NULL, pinned INTEGER NOT NULL, reasons TEXT NOT NULL, load_s REAL, probe TEXT,
    PRIMARY KEY (name, digest)
);
CREATE TABLE moves (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, label TEXT NOT NULL, digest TEXT NOT NULL,
    moved REAL NOT NULL
);
CREATE TABLE policies (name TEXT PRIMARY KEY, policy TEXT NOT NULL);
CREATE TABLE flags (name TEXT PRIMARY KEY, digest TEXT NOT NULL);
CREATE TABLE refusals (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, source TEXT NOT NULL, reasons TEXT NOT NULL,
    refused REAL NOT NULL
);
"""


class StateError(GraftError):
    """A state directory that this server cannot use."""


class State:
    """Owns the lock and the connection from `open` to `close`.

    A label is the last of its `moves`; the one before is where a roll-back leads.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = _lock(directory)
        self._turn = asyncio.Lock()  # of the one change that runs
        try:
            self._connection = _connect(directory / "registry.sqlite")
        except BaseException:
            os.close(self._lock)
            raise
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="registry")

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.shutdown()
        self._connection.close()
        os.close(self._lock)

    @contextmanager
    def transaction(self) -> Iterator[Change]:
        """Keeps what is written to the change inside, all or nothing; blocks, so it is for before a loop runs."""
        change = Change()
        yield change
        self._keep(change)
        change.kept()

    @asynccontextmanager
    async def change(self) -> AsyncIterator[Change]:
        """As `transaction`, beside the event loop, one after another: what is decided inside is so until it is kept.

        Where the task is cancelled at the end, the change is kept all the same.
        """
        await self._turn.acquire()
        try:
            change = Change()
            yield change
            keeping = asyncio.create_task(self._keep_aside(change))
        except BaseException:
            self._turn.release()
            raise
        await asyncio.shield(keeping)

    async def read(self, query: Callable[[], T]) -> T:
        """Returns `query()`, which reads the file, beside the event loop and between changes."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, query)

    async def _keep_aside(self, change: Change) -> None:
        """Ends the turn."""
        try:
            if change.writes:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._keep, change)
            change.kept()
        finally:
            self._turn.release()

    def _keep(self, change: Change) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for statement, values in change.writes:
                self._connection.execute(statement, values)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def fact(self, name: str) -> str | None:
        row = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row["value"])

    def revisions(self) -> list[Revision]:
        rows = self._connection.execute("SELECT * FROM revisions ORDER BY created, name, digest")
        return [_revision(row) for row in rows]

    def moves(self) -> list[Label]:
        """Returns each label as it was after every move of it that is kept, the oldest first."""
        moves: list[Label] = []
        last: dict[tuple[str, str], str] = {}
        for row in self._connection.execute("SELECT * FROM moves ORDER BY id"):
            key = (row["name"], row["label"])
            moves.append(Label(*key, row["digest"], row["moved"], last.get(key)))
            last[key] = row["digest"]
        return moves

    def policies(self) -> dict[str, Policy]:
        rows = self._connection.execute("SELECT * FROM policies")
        return {row["name"]: Policy(**json.loads(row["policy"])) for row in rows}

    def flags(self) -> dict[str, str]:
        """Returns the digest that each `--adapter` flag had when it was promoted last."""
        return {row["name"]: row["digest"] for row in self._connection.execute("SELECT * FROM flags")}

    def refusals(self) -> list[Refusal]:
        """Returns the newest first."""
        rows = self._connection.execute("SELECT * FROM refusals ORDER BY id DESC")
        return [Refusal(row["name"], row["source"], tuple(json.loads(row["reasons"])), row["refused"]) for row in rows]


def _lock(directory: Path) -> int:
    """Returns a descriptor that holds the directory's lock; the system frees it when the process ends, however."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StateError(
            f"--state {directory}: another server uses it; stop that one, or give this one a directory of its own"
        ) from None
    return descriptor


def _connect(path: Path) -> sqlite3.Connection:
    """A rollback journal, fully synced: a commit that returned is on the disk, and one that did not leaves no trace."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)  # its writer is a thread
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA synchronous = EXTRA")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise StateError(
                f"{path}: schema {version}, this server reads {SCHEMA_VERSION}; use the version that wrote it, or "
                "another --state"
            )
    except sqlite3.DatabaseError as error:
        connection.close()
        raise StateError(f"{path} is no registry ({error}); give another --state, or restore the file") from error
    except StateError:
        connection.close()
        raise
    return connection


def _revision(row: sqlite3.Row) -> Revision:
    fields = dict(row)
    probe = None if row["probe"] is None else json.loads(row["probe"])
    if probe is not None:
        probe = ProbeResult(**{**probe, "reference": Reference(probe["reference"])})
    changed = {
        "status": RevisionStatus(row["status"]),
        "pinned": bool(row["pinned"]),
        "reasons": tuple(json.loads(row["reasons"])),
        "probe": probe,
    }
    return Revision(**{**fields, **changed})
