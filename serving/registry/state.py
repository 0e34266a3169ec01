"""The registry's state on disk: one SQLite file, changed in whole transactions by the process that holds its lock."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serving.errors import GraftError
from serving.registry.revision import Label, ProbeResult, Reference, Refusal, Revision, RevisionStatus
from serving.registry.routing import Policy

SCHEMA_VERSION = 1
REFUSALS_KEPT = 100
MOVES_KEPT = 100  # of a label: how far back a roll-back can go
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
    """Owns the lock and the connection from `open` to `close`; every write belongs into a `transaction`.

    A label is the last of its `moves`; the one before is where a roll-back leads.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = _lock(directory)
        self._after: list[Callable[[], None]] | None = None  # of the transaction that runs
        try:
            self._connection = _connect(directory / "registry.sqlite")
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        self._connection.close()
        os.close(self._lock)

    @contextmanager
    def transaction(self) -> Iterator[Callable[[Callable[[], None]], None]]:
        """All writes inside are kept together, or none; what is given to the yielded function runs after the commit.

        A transaction inside another is a part of it.
        """
        if self._after is not None:
            yield self._after.append
            return
        after: list[Callable[[], None]] = []
        self._after = after
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield after.append
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        finally:
            self._after = None
        for update in after:
            update()

    def fact(self, name: str) -> str | None:
        row = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row["value"])

    def revisions(self) -> list[Revision]:
        rows = self._connection.execute("SELECT * FROM revisions ORDER BY created, name, digest")
        return [_revision(row) for row in rows]

    def labels(self) -> list[Label]:
        rows = self._connection.execute("SELECT * FROM moves ORDER BY id")
        found: dict[tuple[str, str], Label] = {}
        for row in rows:
            before = found.get((row["name"], row["label"]))
            previous = None if before is None else before.digest
            found[row["name"], row["label"]] = Label(row["name"], row["label"], row["digest"], row["moved"], previous)
        return list(found.values())

    def policies(self) -> dict[str, Policy]:
        rows = self._connection.execute("SELECT * FROM policies")
        return {row["name"]: Policy(**json.loads(row["policy"])) for row in rows}

    def flags(self) -> dict[str, str]:
        """Returns the digest that each `--adapter` flag had when it was promoted last."""
        return {row["name"]: row["digest"] for row in self._connection.execute("SELECT * FROM flags")}

    def refusals(self) -> list[Refusal]:
        rows = self._connection.execute("SELECT * FROM refusals ORDER BY id DESC")
        return [Refusal(row["name"], row["source"], tuple(json.loads(row["reasons"])), row["refused"]) for row in rows]

    def set_fact(self, name: str, value: str) -> None:
        self._put("facts", {"name": name, "value": value})

    def put_revision(self, revision: Revision) -> None:
        fields = asdict(revision)
        probe = None if revision.probe is None else {**fields["probe"], "reference": revision.probe.reference.value}
        self._put(
            "revisions",
            {
                **fields,
                "status": revision.status.value,
                "reasons": json.dumps(revision.reasons),
                "probe": None if probe is None else json.dumps(probe),
            },
        )

    def move_label(self, label: Label) -> None:
        values = {"name": label.name, "label": label.label, "digest": label.digest, "moved": label.changed}
        self._put("moves", values)
        self._connection.execute(
            "DELETE FROM moves WHERE name = ?1 AND label = ?2 AND id NOT IN "
            "(SELECT id FROM moves WHERE name = ?1 AND label = ?2 ORDER BY id DESC LIMIT ?3)",
            (label.name, label.label, MOVES_KEPT),
        )

    def undo_move(self, name: str, label: str) -> Label:
        """Returns the label as it was before; there has to be a move before the last."""
        self._connection.execute(
            "DELETE FROM moves WHERE id = (SELECT max(id) FROM moves WHERE name = ? AND label = ?)", (name, label)
        )
        return next(each for each in self.labels() if (each.name, each.label) == (name, label))

    def drop_label(self, name: str, label: str) -> None:
        self._connection.execute("DELETE FROM moves WHERE name = ? AND label = ?", (name, label))

    def set_policy(self, name: str, policy: Policy | None) -> None:
        if policy is None:
            self._connection.execute("DELETE FROM policies WHERE name = ?", (name,))
        else:
            self._put("policies", {"name": name, "policy": json.dumps(asdict(policy))})

    def set_flag(self, name: str, digest: str) -> None:
        self._put("flags", {"name": name, "digest": digest})

    def put_refusal(self, refusal: Refusal) -> None:
        self._put("refusals", {**asdict(refusal), "reasons": json.dumps(refusal.reasons)})
        self._connection.execute(
            "DELETE FROM refusals WHERE id NOT IN (SELECT id FROM refusals ORDER BY id DESC LIMIT ?)", (REFUSALS_KEPT,)
        )

    def _put(self, table: str, values: Mapping[str, Any]) -> None:
        names, places = ", ".join(values), ", ".join("?" * len(values))
        self._connection.execute(f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({places})", tuple(values.values()))


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
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)  # opened before the loop runs
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
