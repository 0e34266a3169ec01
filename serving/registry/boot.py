"""The registry's boot: reads the base, what a state directory records, and the flags, and verifies all of it."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from serving.engine.engine import WeightFormat
from serving.errors import AdapterRejected
from serving.registry.admission import AdmissionGate
from serving.registry.catalog import Catalog, ServedModel, adapter_model, load_catalog
from serving.registry.enrolment import Candidate, Enrolment
from serving.registry.files import REVISIONS, RevisionFiles, structure_problems
from serving.registry.labels import STABLE, Labels
from serving.registry.names import Flagged
from serving.registry.registry import Registry
from serving.registry.residency import Residency
from serving.registry.revision import DIGEST_CHARACTERS, Revision, RevisionStatus
from serving.registry.revisions import Revisions
from serving.registry.roots import AdapterRoots
from serving.registry.state import State, StateError
from training.artifact import MANIFEST_NAME, AdapterManifest, ArtifactError, read_manifest, sha256_file

logger = logging.getLogger("graft.registry")

DEFAULT_MAX_ADAPTERS = 16
LEAST_MAX_RANK = 16  # so that a server without adapters takes those of the usual recipes


def open_registry(
    base_name: str,
    base_dir: Path,
    *,
    adapters: Mapping[str, Path] | None = None,
    merged: Mapping[str, Path] | None = None,
    state_dir: Path | None = None,
    adapter_roots: Sequence[Path] = (),
    max_adapters: int = DEFAULT_MAX_ADAPTERS,
    max_rank: int | None = None,
    weights: WeightFormat = WeightFormat.PLAIN,
) -> Registry:
    """Returns a registry that `start` makes answer, and `close` ends; without `state_dir` its state ends with it.

    Raises ModelRejected or AdapterRejected where a given directory cannot be served, with all reasons, and StateError.
    A recorded revision that no longer verifies becomes broken instead.
    """
    catalog = load_catalog(base_name, base_dir, merged or {}, weights)
    directory = (state_dir or Path(tempfile.mkdtemp(prefix="graft-state-"))).resolve()
    temporary = directory if state_dir is None else None
    state = State(directory)
    try:
        boot = _Boot(catalog, base_name, state, adapters or {}, max_rank)
        return boot.registry(max_adapters, AdapterRoots(adapter_roots), temporary)
    except BaseException:
        _end(state, temporary)
        raise


class _Boot:
    """The parts of a registry while it is put together."""

    def __init__(
        self,
        catalog: Catalog,
        base_name: str,
        state: State,
        adapters: Mapping[str, Path],
        max_rank: int | None,
    ) -> None:
        self._catalog, self._base_name, self._state, self._adapters = catalog, base_name, state, adapters
        self._files = RevisionFiles(state.directory / REVISIONS)
        live = [each.rank for each in state.revisions() if each.live]
        max_rank = max_rank or max([LEAST_MAX_RANK, *_ranks(adapters), *live])
        self._gate = AdmissionGate(catalog.base, catalog.models[base_name].variant, max_rank)
        self._revisions = Revisions()

    def registry(self, max_adapters: int, roots: AdapterRoots, temporary: Path | None) -> Registry:
        self._restore()
        pinned = len(self._revisions.pinned_digests())
        if pinned >= max_adapters:
            raise StateError(
                f"--max-adapters {max_adapters}: {pinned} revisions are pinned; give at least {pinned + 1}, and unpin "
                "some while that runs"
            )
        labels = Labels(self._state)
        residency = Residency(max_adapters, self._files.verify)
        enrolment = Enrolment(
            self._catalog.base,
            self._base_name,
            self._state,
            self._files,
            self._gate,
            self._revisions,
            labels,
            residency,
        )
        registry = Registry(
            self._catalog, self._state, self._revisions, labels, enrolment, residency, roots, self._flagged()
        )
        registry.on_close(weakref.finalize(registry, _end, self._state, temporary))
        return registry

    def _restore(self) -> None:
        """Verifies every recorded revision again, ends retirements that a dead process began, and sweeps."""
        fingerprint, before = self._catalog.base.fingerprint, self._state.fact("base_fingerprint")
        if before not in {None, fingerprint}:
            logger.warning("the state was last served on base %s, now on %s", before, fingerprint)
        weights, kept = self._catalog.base.weights.value, self._state.fact("weights")
        if kept not in {None, weights}:
            logger.warning("adapters of this state were probed on a base in %s, not in %s as now", kept, weights)
        with self._state.transaction() as change:
            change.set_fact("base_fingerprint", fingerprint)
            change.set_fact("weights", weights)
            for revision in self._state.revisions():
                if revision.status in {RevisionStatus.RETIRED, RevisionStatus.RETIRING}:
                    self._revisions.put(change, replace(revision, status=RevisionStatus.RETIRED), None)
                else:
                    self._revisions.put(change, *self._verified(revision))
        swept = self._files.sweep(self._revisions.live_digests())
        if swept:
            logger.info("removed what a process left behind: %s", ", ".join(swept))

    def _verified(self, revision: Revision) -> tuple[Revision, ServedModel | None]:
        path = self._files.path(revision.digest)
        try:
            manifest = self._gate.inspect(path)
            problems = _changed(revision, manifest, path)
        except ArtifactError as error:
            problems = list(error.problems)
        if problems:
            logger.error("revision %s is broken: %s", revision.id, "; ".join(problems))
            return replace(revision, status=RevisionStatus.BROKEN, reasons=tuple(problems)), None
        model = adapter_model(revision.name, manifest, path, self._catalog.base, self._base_name)
        return replace(revision, status=RevisionStatus.ADMITTED, reasons=()), model

    def _flagged(self) -> list[Flagged]:
        """Returns what the flags bring; a flag whose adapter is that of the last boot leaves the labels alone."""
        found = []
        for name, directory in self._adapters.items():
            manifest = self._inspect(name, directory)
            known = self._revisions.get(name, manifest.digest)
            again = self._state.flags().get(name) == manifest.digest
            if again and known is not None and known.status is not RevisionStatus.BROKEN:
                continue  # what an administrator did since then holds
            label = None if again else STABLE
            candidate = Candidate(name, directory.resolve(), str(directory), label, flag=True)
            model = adapter_model(name, manifest, directory, self._catalog.base, self._base_name)
            found.append(Flagged(candidate, model))
        return found

    def _inspect(self, name: str, directory: Path) -> AdapterManifest:
        try:
            if problems := structure_problems(directory):
                raise ArtifactError(directory, problems)
            return self._gate.inspect(directory)
        except ArtifactError as error:
            raise AdapterRejected(f"adapter {name}={directory} is refused: {'; '.join(error.problems)}") from error


def _ranks(adapters: Mapping[str, Path]) -> list[int]:
    """An adapter without a manifest has no rank here: the gate says what it lacks."""
    ranks = []
    for directory in adapters.values():
        try:
            ranks.append(read_manifest(directory).lora.rank)
        except (ArtifactError, OSError):
            continue
    return ranks


def _changed(revision: Revision, manifest: AdapterManifest, path: Path) -> list[str]:
    if manifest.digest != revision.digest:
        return [f"its stored files are those of {manifest.digest[:DIGEST_CHARACTERS]}"]
    if sha256_file(path / MANIFEST_NAME) != revision.manifest_sha256:
        return [f"{MANIFEST_NAME}: changed since it was admitted"]
    return []


def _end(state: State, temporary: Path | None) -> None:
    state.close()
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
