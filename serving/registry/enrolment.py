"""The enrolment: brings revisions in, through the gate, and takes them out again, one change after another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.engine.engine import Engine
from serving.errors import AdapterRejected, Conflict
from serving.registry.admission import AdmissionGate
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel, adapter_model
from serving.registry.files import RevisionFiles
from serving.registry.labels import Labels
from serving.registry.residency import Residency
from serving.registry.revision import ProbeResult, Refusal, Revision, RevisionStatus
from serving.registry.revisions import Revisions
from serving.registry.state import State
from training.artifact import MANIFEST_NAME, AdapterManifest, ArtifactError, sha256_file

logger = logging.getLogger("graft.registry")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter directory, by its real path, that is to become a revision of `name`; errors call it `source`."""

    name: str
    directory: Path
    source: str
    label: str | None = None
    flag: bool = False  # it comes from an `--adapter` flag


class Enrolment:
    """What fails leaves everything as it was, but for a record of the refusal."""

    def __init__(
        self,
        base: LoadedBase,
        base_name: str,
        state: State,
        files: RevisionFiles,
        gate: AdmissionGate,
        revisions: Revisions,
        labels: Labels,
        residency: Residency,
    ) -> None:
        self._base, self._base_name = base, base_name
        self._state, self._files, self._gate = state, files, gate
        self._revisions, self._labels, self._residency = revisions, labels, residency
        self.max_rank = gate.max_rank
        self._lock = asyncio.Lock()

    async def enrol(self, engine: Engine, candidate: Candidate) -> Revision:
        """Returns the admitted revision, known before or new; raises AdapterRejected with all reasons."""
        async with self._lock:
            try:
                fixed = self._revisions.fixed_digests()
                manifest = await asyncio.to_thread(self._files.take, candidate.directory, self._gate.inspect, fixed)
                return await self._admit(engine, candidate, manifest)
            except ArtifactError as error:
                raise await self._refused(candidate, error.problems) from error
            except OSError as error:
                reason = f"{error.filename}: cannot be read ({error.strerror})"
                raise await self._refused(candidate, [reason]) from error
            except AdapterRejected as error:
                raise await self._refused(candidate, [error.message]) from error

    async def take_out(self, revision: Revision) -> Revision:
        """Frees a revision that no request holds, and its files unless another name shares them."""
        async with self._lock:
            if not self._revisions.shared(revision):
                await self._residency.drop(revision.digest)
                await asyncio.to_thread(self._files.remove, revision.digest)
            async with self._state.change() as change:
                retired = self._revisions.retire(change, revision, self._labels.history())
        logger.info("retired %s", revision.id)
        return retired

    async def _admit(self, engine: Engine, candidate: Candidate, manifest: AdapterManifest) -> Revision:
        known = self._revisions.get(candidate.name, manifest.digest)
        if known is not None and known.status is RevisionStatus.RETIRING:
            raise Conflict(f"revision {known.id} is being retired; register it again when that has ended")
        path = self._files.path(manifest.digest)
        model = adapter_model(candidate.name, manifest, path, self._base, self._base_name)
        if known is not None and known.status is RevisionStatus.ADMITTED:
            revision = known
        else:
            try:
                probe, load_s = await self._prove(engine, model)
            except BaseException:
                await self._undo(manifest.digest)
                raise
            revision = _revision(candidate.name, manifest, path, known, probe, load_s)
        async with self._state.change() as change:
            if self._revisions.get(candidate.name, manifest.digest) is not known:  # retired meanwhile, for one
                raise Conflict(f"revision {model.revision} changed while it was registered; register it again")
            if revision is not known:
                self._revisions.put(change, revision, model)
            if candidate.label is not None:
                self._labels.move(change, candidate.name, candidate.label, manifest.digest, None)
            if candidate.flag:
                change.set_flag(candidate.name, manifest.digest)
        if revision is not known:
            logger.info("admitted %s: %s", revision.id, revision.probe)
        return revision

    async def _prove(self, engine: Engine, model: ServedModel) -> tuple[ProbeResult, float | None]:
        try:
            await self._residency.enter(model.variant)
        except AdapterRejected as error:  # the engine names the stored copy, which nobody asked about
            stored = f"adapter {model.variant.name!r} ({model.variant.path}): "
            raise AdapterRejected(error.message.removeprefix(stored)) from error
        try:
            probe = await self._gate.probe(engine, model.variant)
            return probe, self._residency.load_s(model.variant.digest)
        finally:
            self._residency.leave(model.variant)

    async def _undo(self, digest: str) -> None:
        """The files of a broken revision stay: it may be looked into."""
        if digest not in self._revisions.fixed_digests():
            await self._residency.drop(digest)
        if digest not in self._revisions.live_digests():
            await asyncio.to_thread(self._files.remove, digest)

    async def _refused(self, candidate: Candidate, reasons: Sequence[str]) -> AdapterRejected:
        # A file's name need not be UTF-8; the answer and the list of refusals are.
        reasons = [reason.encode(errors="backslashreplace").decode() for reason in reasons]
        logger.warning("refused adapter %s=%s: %s", candidate.name, candidate.source, "; ".join(reasons))
        async with self._state.change() as change:
            change.put_refusal(Refusal(candidate.name, candidate.source, tuple(reasons), time.time()))
        message = f"adapter {candidate.name}={candidate.source} is refused: {'; '.join(reasons)}"
        return AdapterRejected(message, reasons=reasons)


def _revision(
    name: str,
    manifest: AdapterManifest,
    path: Path,
    known: Revision | None,
    probe: ProbeResult,
    load_s: float | None,
) -> Revision:
    return Revision(
        name=name,
        digest=manifest.digest,
        status=RevisionStatus.ADMITTED,
        created=time.time() if known is None else known.created,
        rank=manifest.lora.rank,
        manifest_sha256=sha256_file(path / MANIFEST_NAME),
        pinned=known is not None and known.pinned,
        load_s=load_s,
        probe=probe,
    )
