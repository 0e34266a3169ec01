"""The names: what the `model` of a request means now."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serving.errors import ModelNotFound
from serving.registry.catalog import Catalog, ServedModel
from serving.registry.enrolment import Candidate
from serving.registry.labels import STABLE, Labels
from serving.registry.revision import RevisionStatus
from serving.registry.revisions import Revisions
from serving.registry.routing import choose


@dataclass(frozen=True, slots=True)
class Flagged:
    """What an `--adapter` flag brings: a candidate, and how it will answer once it has passed the gate."""

    candidate: Candidate
    model: ServedModel

    def means(self, model: str) -> bool:
        name = self.candidate.name
        at, digest = f"{name}@", model.removeprefix(f"{name}@")
        exact = model.startswith(at) and digest != "" and self.model.variant.digest.startswith(digest)
        return exact or (self.candidate.label is not None and model in {name, f"{name}:{STABLE}"})


class Names:
    """Reads only. A flag's adapter stands for its name's stable label until it has passed the gate."""

    def __init__(self, catalog: Catalog, revisions: Revisions, labels: Labels, flagged: Sequence[Flagged]) -> None:
        self._fixed, self._revisions, self._labels = catalog.models, revisions, labels
        self._flagged = {each.candidate.name: each for each in flagged}

    def flagged(self) -> Sequence[Flagged]:
        return list(self._flagged.values())

    def passed(self, flagged: Flagged) -> None:
        del self._flagged[flagged.candidate.name]

    def served(self) -> Mapping[str, ServedModel]:
        """Returns what answers, by what a request calls it: its name, or where that alone means nothing its labels.

        A name without any label is asked for by its digests.
        """
        labelled: dict[str, dict[str, ServedModel]] = {}
        exact: dict[str, dict[str, ServedModel]] = {}
        for label in self._labels:
            if (model := self._labelled(label.name, label.label)) is not None:
                labelled.setdefault(label.name, {})[f"{label.name}:{label.label}"] = model
        for revision in self._revisions:
            if (model := self._revisions.model(revision)) is not None:
                exact.setdefault(revision.name, {})[revision.id] = model
        adapters: dict[str, ServedModel] = {}
        for name in dict.fromkeys([*labelled, *exact]):
            alone = self._labelled(name, self._heaviest(name))
            adapters |= (labelled.get(name) or exact[name]) if alone is None else {name: alone}
        flagged = {name: each.model for name, each in self._flagged.items() if each.candidate.label is not None}
        return {**self._fixed, **adapters, **flagged}

    def route(self, model: str, routing_key: str | None) -> tuple[ServedModel, str | None]:
        """Returns what answers, and the label that chose it; raises ModelNotFound or RevisionUnavailable."""
        return self._find(model, lambda name: self._arm(name, routing_key))

    def heaviest(self, model: str) -> ServedModel:
        """Returns what `route` may return, without a draw: by the stable label where that can be, or the heaviest."""
        return self._find(model, self._heaviest)[0]

    def shadow(self, model: str, answering: ServedModel) -> str | None:
        """Returns the revision that gets a request for a bare name too, unless it is the one that answers or cannot."""
        policy = self._labels.policy(model)
        label = None if policy is None or policy.shadow is None else self._labels.find(model, policy.shadow)
        if label is None or label.digest == answering.variant.digest:
            return None
        revision = self._revisions.get(model, label.digest)
        return revision.id if revision is not None and revision.status is RevisionStatus.ADMITTED else None

    def _find(self, model: str, arm: Callable[[str], str]) -> tuple[ServedModel, str | None]:
        name, at, prefix = model.partition("@")
        fixed = self._fixed.get(name)
        if fixed is not None and (not at or (prefix and fixed.variant.digest.startswith(prefix))):
            return fixed, None
        for each in self._flagged.values():
            if each.means(model):
                return each.model, None if at else STABLE
        if not at:
            return self._by_label(model, arm)
        if not any(each.name == name for each in self._revisions):
            raise self._unknown(model)
        return self._revisions.answering(self._revisions.find(name, prefix)), None

    def _by_label(self, model: str, arm: Callable[[str], str]) -> tuple[ServedModel, str]:
        name, colon, label = model.partition(":")
        found = self._labels.find(name, label if colon else arm(name))
        revision = None if found is None else self._revisions.get(name, found.digest)
        if found is None or revision is None:
            raise self._unknown(model)
        return self._revisions.answering(revision), found.label

    def _labelled(self, name: str, label: str) -> ServedModel | None:
        found = self._labels.find(name, label)
        revision = None if found is None else self._revisions.get(name, found.digest)
        return None if revision is None else self._revisions.model(revision)

    def _unknown(self, model: str) -> ModelNotFound:
        known = ", ".join(dict.fromkeys(served.revision for served in self.served().values()))
        return ModelNotFound(f"model {model[:200]!r} does not exist; served are: {known}", param="model")

    def _arm(self, name: str, routing_key: str | None) -> str:
        policy = self._labels.policy(name)
        return STABLE if policy is None else choose(policy, name, routing_key, random.random)

    def _heaviest(self, name: str) -> str:
        policy = self._labels.policy(name)
        if policy is None or STABLE in policy.weights:
            return STABLE
        return max(policy.weights, key=lambda label: policy.weights[label])
