"""The labels: what `name:label` points at, and each name's routing policy."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator

from serving.errors import BadRequest, Conflict, ModelNotFound
from serving.registry.revision import DIGEST_CHARACTERS, Label
from serving.registry.routing import Policy
from serving.registry.state import State

STABLE = "stable"
LABEL = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


class Labels:
    """Every change is one transaction; what is read here changes after its commit."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._labels = {(label.name, label.label): label for label in state.labels()}
        self._policies = state.policies()

    def __iter__(self) -> Iterator[Label]:
        return iter(tuple(self._labels.values()))

    def find(self, name: str, label: str) -> Label | None:
        return self._labels.get((name, label))

    def policy(self, name: str) -> Policy | None:
        return self._policies.get(name)

    def users(self, name: str, digest: str) -> list[str]:
        """Returns the labels of `name` that point at a revision."""
        return [each.label for each in self if (each.name, each.digest) == (name, digest)]

    def move(self, name: str, label: str, digest: str, expected: str | None) -> Label:
        """Raises Conflict where the label does not point at `expected`, a digest's beginning; None leaves it open."""
        current = self.find(name, label)
        if expected is not None and not (expected and current and current.digest.startswith(expected)):
            at = "at nothing" if current is None else f"at {current.digest[:DIGEST_CHARACTERS]}"
            raise Conflict(
                f"{name}:{label} points {at}, not at the expected {expected[:DIGEST_CHARACTERS]}; read it again",
                param="expected",
            )
        previous = None if current is None else current.digest
        moved = Label(name, label, digest, time.time(), previous)
        if current is not None and current.digest == digest:
            moved = current
        if moved is not current:
            with self._state.transaction() as then:
                self._state.move_label(moved)
                then(lambda: self._labels.update({(name, label): moved}))
        return moved

    def roll_back(self, name: str, label: str, available: Collection[str]) -> Label:
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
        with self._state.transaction() as then:
            back = self._state.undo_move(name, label)
            then(lambda: self._labels.update({(name, label): back}))
        return back

    def remove(self, name: str, label: str) -> None:
        """Raises Conflict while the name's policy routes to the label."""
        self._require(name, label)
        policy = self.policy(name)
        if policy is not None and label in policy.labels:
            raise Conflict(f"the policy of {name!r} routes to {label!r}; change it first", param="label")
        with self._state.transaction() as then:
            self._state.drop_label(name, label)
            then(lambda: self._labels.__delitem__((name, label)))

    def set_policy(self, name: str, policy: Policy | None) -> None:
        """None removes it. Raises BadRequest where it is no policy or routes to a label that the name lacks."""
        if policy is not None:
            problems = policy.problems()
            problems += [f"{name!r} has no label {each!r}" for each in policy.labels if not self.find(name, each)]
            if problems:
                raise BadRequest("; ".join(sorted(problems)), param="policy")
        with self._state.transaction() as then:
            self._state.set_policy(name, policy)
            then(lambda: self._keep_policy(name, policy))

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
