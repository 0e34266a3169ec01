"""The registry: which revisions there are, what each model name means now, and every change of that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from serving.config import MODEL_NAME
from serving.engine.engine import Engine, WeightsCost
from serving.errors import (
    AdapterRejected,
    BadRequest,
    Conflict,
    NameTaken,
    NotReady,
    RevisionUnavailable,
)
from serving.registry.base import LoadedBase
from serving.registry.catalog import Catalog, ServedModel
from serving.registry.enrolment import Candidate, Enrolment
from serving.registry.labels import Labels, check_label
from serving.registry.lease import Lease
from serving.registry.names import Flagged, Names
from serving.registry.residency import Residency
from serving.registry.revision import Label, Refusal, Revision, RevisionStatus
from serving.registry.revisions import Revisions
from serving.registry.roots import AdapterRoots
from serving.registry.routing import Policy
from serving.registry.state import State
from serving.registry.uses import Uses

logger = logging.getLogger("graft.registry")


class Registry:
    """One event loop's object. A model is `base`, a merged model's name, `name`, `name:label` or `name@digest`.

    `name` alone is routed by the name's policy, and by none to its label `stable`.
    """

    def __init__(
        self,
        catalog: Catalog,
        state: State,
        revisions: Revisions,
        labels: Labels,
        enrolment: Enrolment,
        residency: Residency,
        roots: AdapterRoots,
        flagged: Sequence[Flagged],
    ) -> None:
        self.base: LoadedBase = catalog.base
        self.directory = state.directory
        self.max_rank = enrolment.max_rank
        self.residency = residency
        self.uses = Uses()
        self._fixed = catalog.models
        self._state, self._revisions, self._labels = state, revisions, labels
        self._enrolment, self._roots = enrolment, roots
        self._names = Names(catalog, revisions, labels, flagged)
        self._close: Callable[[], object] = state.close
        self._engine: Engine | None = None
        self._retirements: dict[tuple[str, str], asyncio.Task[Revision]] = {}

    async def start(self, engine: Engine) -> None:
        """Makes a started engine answer; raises where a base, merged model or `--adapter` cannot.

        A revision that was recorded before and does not load becomes broken; the others serve.
        """
        for model in self._fixed.values():
            await engine.add(model.variant)
        self.residency.attach(engine)
        self.residency.pin(self._revisions.pinned_digests())
        for flagged in self._names.flagged():
            await self._enrolment.enrol(engine, flagged.candidate)
            self._names.passed(flagged)
        self._engine = engine
        for revision in self._first_loads():
            await self._load(revision)

    def on_close(self, close: Callable[[], object]) -> None:
        """`close` takes the place of closing the state."""
        self._close = close

    async def close(self) -> None:
        """Ends retirements where they are, and gives the state directory free."""
        for task in self._retirements.values():
            task.cancel()
        await asyncio.gather(*self._retirements.values(), return_exceptions=True)
        await self.residency.close()
        async with self._state.change():  # what is being changed is kept first
            self._close()

    def lease(self, model: str, routing_key: str | None = None) -> Lease:
        """Counts the use from here on; raises ModelNotFound, RevisionUnavailable, or NotReady before `start`."""
        if self._engine is None:
            raise NotReady("the model is still loading; wait until GET /readyz answers 200")
        served, arm = self._names.route(model, routing_key)
        if served.is_adapter:
            self.uses.begin((served.name, served.variant.digest))
        shadow = self._names.shadow(model, served)
        return Lease(served, arm, shadow, enter=self.enter, residency=self.residency, uses=self.uses)

    def resolve(self, model: str) -> ServedModel:
        """Returns what a lease may hold, without a draw: see Names.heaviest; counts nothing."""
        return self._names.heaviest(model)

    def weights_cost(self) -> WeightsCost | None:
        """Returns what the format of the base's weights costs where the engine measured it; None before `start`."""
        return None if self._engine is None else self._engine.weights_cost

    def adapters(self) -> int:
        """Returns how many different adapters there are now, with those that flags bring."""
        return len(self._revisions.live_digests() | {each.model.variant.digest for each in self._names.flagged()})

    def served(self) -> Mapping[str, ServedModel]:
        """Returns the base, the merged models and the adapters that can answer, by what a request calls them."""
        return self._names.served()

    def revisions(self) -> Sequence[Revision]:
        return list(self._revisions)

    def revision(self, name: str, digest_prefix: str) -> Revision:
        """Raises ModelNotFound where no revision's digest begins so, or several do."""
        return self._revisions.find(name, digest_prefix)

    def labels(self) -> Sequence[Label]:
        return list(self._labels)

    async def refusals(self) -> Sequence[Refusal]:
        """Returns the adapters that the gate turned away, the newest first."""
        return await self._state.read(self._state.refusals)

    def policy(self, name: str) -> Policy | None:
        return self._labels.policy(name)

    async def register(
        self, name: str, source: Path, label: str | None = None, *, downloaded: Path | None = None
    ) -> Revision:
        """Admits the adapter at `source` below a root, and moves `label` to it.

        `downloaded` is where below the state the server itself put the files of a `source` that is no path.
        Raises PathRefused, NameTaken, or AdapterRejected with all reasons; then nothing has changed.
        """
        if not MODEL_NAME.fullmatch(name):
            raise BadRequest(
                f"name {name[:200]!r}: use up to 100 letters, digits, '.', '_', '-' or '/', a letter or digit first",
                param="name",
            )
        if name in self._fixed:
            raise NameTaken(f"name {name!r} is that of a base or merged model; give another", param="name")
        if label is not None:
            check_label(label)
        if self._engine is None:
            raise NotReady("the model is still loading; wait until GET /readyz answers 200")
        candidate = Candidate(name, downloaded or self._roots.locate(source), str(source), label)
        return await self._enrolment.enrol(self._engine, candidate)

    async def retire(self, name: str, digest: str, wait_s: float | None = None) -> Revision:
        """Takes no new use, waits for the running ones, frees the engine, removes the files.

        Raises Conflict while a label points at it. After `wait_s` it returns the revision as it is, and goes on.
        """
        async with self._state.change() as change:
            revision = self.revision(name, digest)
            if labels := self._labels.users(name, revision.digest):
                raise Conflict(
                    f"revision {revision.id} is what {', '.join(f'{name}:{label}' for label in labels)} points at; "
                    "promote another, or remove the label first",
                    param="digest",
                )
            if revision.status is not RevisionStatus.RETIRED and revision.key not in self._retirements:
                retiring = replace(revision, status=RevisionStatus.RETIRING, pinned=False)
                self._revisions.put(change, retiring, None)
                change.then(lambda: self._drain(retiring))
        draining = self._retirements.get(revision.key)
        if draining is not None and (await asyncio.wait([draining], timeout=wait_s))[0]:
            return draining.result()
        return self.revision(*revision.key)

    async def promote(self, name: str, label: str, digest: str, expected: str | None = None) -> Label:
        """Moves a label at once; raises Conflict where it does not point at `expected`, or `digest` is not admitted."""
        check_label(label)
        async with self._state.change() as change:
            revision = self.revision(name, digest)
            if revision.status is not RevisionStatus.ADMITTED:
                raise Conflict(f"revision {revision.id} is {revision.status.value}; register it again", param="digest")
            moved = self._labels.move(change, name, label, revision.digest, expected)
        logger.info("%s:%s points at %s", name, label, revision.id)
        return moved

    async def roll_back(self, name: str, label: str) -> Label:
        """Moves a label to where it pointed before; raises Conflict where that is nowhere, or admitted no more."""
        async with self._state.change() as change:
            admitted = {
                each.digest for each in self._revisions if each.name == name and each.status is RevisionStatus.ADMITTED
            }
            return self._labels.roll_back(change, name, label, admitted)

    async def remove_label(self, name: str, label: str) -> None:
        async with self._state.change() as change:
            self._labels.remove(change, name, label)

    async def set_policy(self, name: str, policy: Policy | None) -> None:
        async with self._state.change() as change:
            self._labels.set_policy(change, name, policy)

    async def pin(self, name: str, digest: str, pinned: bool) -> Revision:
        """A pinned revision is loaded at each start and never evicted; one place in the engine stays for the others."""
        async with self._state.change() as change:
            revision = replace(self.revision(name, digest), pinned=pinned)
            if pinned and revision.status is not RevisionStatus.ADMITTED:
                raise Conflict(f"revision {revision.id} is {revision.status.value}; only admitted ones are pinned")
            digests = self._revisions.pinned_digests() | ({revision.digest} if pinned else set())
            if pinned and len(digests) >= self.residency.limit:
                raise Conflict(
                    f"{len(digests)} pinned revisions would leave no place for others: the engine holds "
                    f"{self.residency.limit}; unpin one, or start with a larger --max-adapters"
                )
            self._revisions.put(change, revision, self._revisions.model(revision))
            change.then(lambda: self.residency.pin(self._revisions.pinned_digests()))
        return revision

    async def enter(self, model: ServedModel) -> None:
        """Has the engine hold a leased model; one whose files do not load any more is broken from here on."""
        try:
            await self.residency.enter(model.variant)
        except AdapterRejected as error:
            async with self._state.change() as change:
                revision = self.revision(model.name, model.variant.digest)
                if revision.status is RevisionStatus.ADMITTED:
                    broken = replace(revision, status=RevisionStatus.BROKEN, reasons=(error.message,))
                    self._revisions.put(change, broken, None)
            raise RevisionUnavailable(
                f"revision {revision.id} cannot answer: {error.message}; an administrator has to register it again, "
                "or promote another",
                param="model",
            ) from error

    def _first_loads(self) -> list[Revision]:
        """Pinned revisions, then those with a label, as many as there are places; others load when they are used."""
        pinned = self._revisions.pinned_digests()
        labelled = {(label.name, label.digest) for label in self._labels}
        wanted = [each for each in self._revisions if each.digest in pinned or each.key in labelled]
        wanted.sort(key=lambda each: each.digest not in pinned)
        answering = {each.digest: each for each in reversed(wanted) if self._revisions.model(each) is not None}
        return list(reversed(answering.values()))[: self.residency.limit]

    async def _load(self, revision: Revision) -> None:
        model = self._revisions.model(revision)
        if model is None:
            return
        try:
            await self.enter(model)
        except RevisionUnavailable as error:
            logger.error("%s", error.message)
        else:
            self.residency.leave(model.variant)

    def _drain(self, retiring: Revision) -> None:
        self.residency.pin(self._revisions.pinned_digests())
        self._retirements[retiring.key] = asyncio.create_task(self._retire(retiring))

    async def _retire(self, revision: Revision) -> Revision:
        try:
            await self.uses.ended(revision.key)
            return await self._enrolment.take_out(revision)
        finally:
            del self._retirements[revision.key]
