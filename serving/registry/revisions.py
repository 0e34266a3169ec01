"""The revisions of every name, found by their digests."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial

from serving.errors import ModelNotFound, RevisionUnavailable
from serving.registry.catalog import ServedModel
from serving.registry.change import Change
from serving.registry.revision import DIGEST_CHARACTERS, Revision, RevisionStatus

Key = tuple[str, str]  # name, digest
RETIRED_KEPT = 100


class Revisions:
    """What is read here changes once a change is kept."""

    def __init__(self) -> None:
        self._revisions: dict[Key, Revision] = {}
        self._models: dict[Key, ServedModel] = {}

    def __iter__(self) -> Iterator[Revision]:
        return iter(tuple(self._revisions.values()))

    def get(self, name: str, digest: str) -> Revision | None:
        return self._revisions.get((name, digest))

    def put(self, change: Change, revision: Revision, model: ServedModel | None) -> None:
        """`model` is how it answers; None for a revision that does not."""
        change.put_revision(revision)
        change.then(lambda: self.keep(revision, model))

    def retire(self, change: Change, revision: Revision, needed: Collection[Key]) -> Revision:
        """Returns it retired. Of all retired the RETIRED_KEPT registered last and those `needed` stay known."""
        retired = replace(revision, status=RevisionStatus.RETIRED)
        self.put(change, retired, None)
        known = {**self._revisions, revision.key: retired}.values()
        spare = [each for each in known if each.status is RevisionStatus.RETIRED and each.key not in needed]
        for each in sorted(spare, key=lambda each: each.created)[:-RETIRED_KEPT]:
            change.forget_revision(each)
            change.then(partial(self._revisions.pop, each.key))
        return retired

    def keep(self, revision: Revision, model: ServedModel | None) -> None:
        """Takes over what the state holds already."""
        self._revisions[revision.key] = revision
        self._models.pop(revision.key, None)
        if model is not None:
            self._models[revision.key] = model

    def model(self, revision: Revision) -> ServedModel | None:
        return self._models.get(revision.key)

    def find(self, name: str, prefix: str) -> Revision:
        """Returns the one revision whose digest begins so; raises ModelNotFound where there is none or are several."""
        named = [each for each in self if each.name == name]
        found = [each for each in named if prefix and each.digest.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if found:
            many = ", ".join(sorted(each.digest[:DIGEST_CHARACTERS] for each in found[:5]))
            raise ModelNotFound(
                f"{name}@{prefix} is ambiguous: {len(found)} revisions begin so ({many}); give more of the digest",
                param="model",
            )
        known = ", ".join(each.id for each in named if each.live) or "none"
        raise ModelNotFound(
            f"model '{name[:100]}@{prefix[:100]}' does not exist; live revisions of the name: {known}", param="model"
        )

    def answering(self, revision: Revision) -> ServedModel:
        """Returns how an admitted revision answers; raises RevisionUnavailable or ModelNotFound for another."""
        model = self._models.get(revision.key)
        if revision.status is RevisionStatus.ADMITTED and model is not None:
            return model
        if revision.status is RevisionStatus.BROKEN:
            raise RevisionUnavailable(
                f"revision {revision.id} cannot answer: {'; '.join(revision.reasons)}; an administrator has to "
                "register it again, or promote another",
                param="model",
            )
        raise ModelNotFound(f"revision {revision.id} is {revision.status.value}; ask for another", param="model")

    def shared(self, revision: Revision) -> bool:
        """Whether another name keeps the same files."""
        return any(each.live and each.digest == revision.digest and each.name != revision.name for each in self)

    def live_digests(self) -> set[str]:
        return {each.digest for each in self if each.live}

    def fixed_digests(self) -> set[str]:
        """Returns those whose files and weights are in use: they answer, or a last request ends on them."""
        return {each.digest for each in self if each.status in {RevisionStatus.ADMITTED, RevisionStatus.RETIRING}}

    def pinned_digests(self) -> frozenset[str]:
        """A broken revision keeps its pin, and with it its place, for when it is registered again."""
        return frozenset(each.digest for each in self if each.pinned)
