"""The labels: what `name:label` points at, and each name's routing policy."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from serving.errors import BadRequest, Conflict, ModelNotFound
from serving.registry.change import MOVES_KEPT, Change
from serving.registry.revision import DIGEST_CHARACTERS, Label
from serving.registry.routing import Policy
from serving.registry.state import State

Key = tuple[str, str]  # name, label
STABLE = "stable"
LABEL = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


class Labels:
    """What is read here changes once a change is kept; what is changed is judged by what is read here."""

    def __init__(self, state: State) -> None:
        self._moves: dict[Key, list[Label]] = {}  # of each label as the state keeps them, the oldest first
        for move in state.moves():
            self._moves.setdefault((move.name, move.label), []).append(move)
        self._policies = state.policies()

    def __iter__(self) -> Iterator[Label]:
        return iter([moves[-1] for moves in self._moves.values()])

    def find(self, name: str, label: str) -> Label | None:
        moves = self._moves.get((name, label))
        return None if moves is None else moves[-1]

    def policy(self, name: str) -> Policy | None:
        return self._policies.get(name)

    def users(self, name: str, digest: str) -> list[str]:
        """Returns the labels of `name` that point at a revision."""
        return [each.label for each in self if (each.name, each.digest) == (name, digest)]

    def history(self) -> set[tuple[str, str]]:
        """Returns the name and digest of every revision that a label points at, or comes to by roll-backs."""
        return {(move.name, move.digest) for moves in self._moves.values() for move in moves}

    def move(self, change: Change, name: str, label: str, digest: str, expected: str | None) -> Label:
        """Raises Conflict where the label does not point at `expected`, a digest's beginning; None leaves it open."""
        current = self.find(name, label)
        if expected is not None and not (expected and current and current.digest.startswith(expected)):
            at = "at nothing" if current is None else f"at {current.digest[:DIGEST_CHARACTERS]}"
            raise Conflict(
                f"{name}:{label} points {at}, not at the expected {expected[:DIGEST_CHARACTERS]}; read it again",
                param="expected",
            )
        if current is not None and current.digest == digest:
            return current
        moved = Label(name, label, digest, time.time(), None if current is None else current.digest)
        change.move_label(moved)
        change.then(lambda: self._keep_moves((name, label), [*self._moves.get((name, label), []), moved]))
        return moved

    def roll_back(self, change: Change, name: str, label: str, available: Collection[str]) -> Label:
        """Returns the label as it was before its last move; raises Conflict where that revision is not `available`."""
        current = self._require(name, label)
        if current.previous is None:
            raise Conflict(f"{name}:{label} has pointed at nothing else; promote a revision", param="label")
        if current.previous not in available:
            raise Conflict(
                f"{name}:{label} pointed at {current.previous[:DIGEST_CHARACTERS]} before, which is not admitted any "
                "more; register it again, or promote another",
                param="label",
            )
        left = self._moves[name, label][:-1]
        change.undo_move(name, label)
        change.then(lambda: self._keep_moves((name, label), left))
        return left[-1]

    def remove(self, change: Change, name: str, label: str) -> None:
        """Raises Conflict while the name's policy routes to the label."""
        self._require(name, label)
        policy = self.policy(name)
        if policy is not None and label in policy.labels:
            raise Conflict(f"the policy of {name!r} routes to {label!r}; change it first", param="label")
        change.drop_label(name, label)
        change.then(lambda: self._moves.__delitem__((name, label)))

    def set_policy(self, change: Change, name: str, policy: Policy | None) -> None:
        """None removes it. Raises BadRequest where it is no policy or routes to a label that the name lacks."""
        if policy is not None:
            problems = policy.problems()
            problems += [f"{name!r} has no label {each!r}" for each in policy.labels if not self.find(name, each)]
            if problems:
                raise BadRequest("; ".join(sorted(problems)), param="policy")
        change.set_policy(name, policy)
        change.then(lambda: self._keep_policy(name, policy))

    def _keep_moves(self, key: Key, moves: Sequence[Label]) -> None:
        """The oldest that is kept has nothing before it."""
        first, *others = moves[-MOVES_KEPT:]
        self._moves[key] = [replace(first, previous=None), *others]

    def _keep_policy(self, name: str, policy: Policy | None) -> None:
        if policy is None:
            self._policies.pop(name, None)
        else:
            self._policies[name] = policy

    def _require(self, name: str, label: str) -> Label:
        found = self.find(name, label)
        if found is None:
            raise ModelNotFound(f"{name[:200]!r} has no label {label[:200]!r}; promote a revision to it", param="label")
        return found


def check_label(label: str) -> None:
    """Raises BadRequest for what is no label."""
    if not LABEL.fullmatch(label):
        raise BadRequest(
            f"label {label[:200]!r}: use up to 32 small letters, digits, '_' or '-', a letter or digit first",
            param="label",
        )
