"""The change: writes to the registry's state that are kept together or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from serving.registry.revision import Label, Refusal, Revision
from serving.registry.routing import Policy

REFUSALS_KEPT = 100
MOVES_KEPT = 100  # of a label: how far back a roll-back can go


class Change:
    """Gathers what to write; a State keeps it. What is given to `then` runs after the commit, in order."""

    def __init__(self) -> None:
        self.writes: list[tuple[str, tuple[Any, ...]]] = []
        self._after: list[Callable[[], object]] = []

    def then(self, update: Callable[[], object]) -> None:
        self._after.append(update)

    def kept(self) -> None:
        """For the State: the writes are on the disk."""
        for update in self._after:
            update()

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

    def forget_revision(self, revision: Revision) -> None:
        self._write("DELETE FROM revisions WHERE name = ? AND digest = ?", *revision.key)

    def move_label(self, label: Label) -> None:
        values = {"name": label.name, "label": label.label, "digest": label.digest, "moved": label.changed}
        self._put("moves", values)
        self._write(
            "DELETE FROM moves WHERE name = ?1 AND label = ?2 AND id NOT IN "
            "(SELECT id FROM moves WHERE name = ?1 AND label = ?2 ORDER BY id DESC LIMIT ?3)",
            label.name,
            label.label,
            MOVES_KEPT,
        )

    def undo_move(self, name: str, label: str) -> None:
        """There has to be a move before the last."""
        self._write(
            "DELETE FROM moves WHERE id = (SELECT max(id) FROM moves WHERE name = ? AND label = ?)", name, label
        )

    def drop_label(self, name: str, label: str) -> None:
        self._write("DELETE FROM moves WHERE name = ? AND label = ?", name, label)

    def set_policy(self, name: str, policy: Policy | None) -> None:
        if policy is None:
            self._write("DELETE FROM policies WHERE name = ?", name)
        else:
            self._put("policies", {"name": name, "policy": json.dumps(asdict(policy))})

    def set_flag(self, name: str, digest: str) -> None:
        self._put("flags", {"name": name, "digest": digest})

    def put_refusal(self, refusal: Refusal) -> None:
        self._put("refusals", {**asdict(refusal), "reasons": json.dumps(refusal.reasons)})
        self._write(
            "DELETE FROM refusals WHERE id NOT IN (SELECT id FROM refusals ORDER BY id DESC LIMIT ?)", REFUSALS_KEPT
        )

    def _put(self, table: str, values: Mapping[str, Any]) -> None:
        names, places = ", ".join(values), ", ".join("?" * len(values))
        self._write(f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({places})", *values.values())

    def _write(self, statement: str, *values: Any) -> None:
        self.writes.append((statement, values))
