"""The administration: what an administrator's requests do to the registry, and what it says of itself."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from serving.admin.hub import download
from serving.admin.protocol import (
    Deleted,
    InspectedRevision,
    LabelList,
    LabelView,
    PolicyRequest,
    PolicyView,
    PromoteRequest,
    RegisterRequest,
    RevisionList,
    RevisionView,
    ShadowReport,
)
from serving.admin.views import inspected_view, label_view, policy_view, refusal_view, revision_view
from serving.errors import BadRequest, ModelNotFound
from serving.registry.files import REVISIONS
from serving.registry.registry import Registry
from serving.registry.revision import Revision, RevisionStatus
from serving.registry.routing import Policy
from serving.shadow import Shadows
from training.artifact import read_manifest


class Administration:
    """`hub` is the URL of a model hub; None: the one that the environment names to the hub's own client."""

    def __init__(self, registry: Registry, shadows: Shadows, hub: str | None = None) -> None:
        self._registry = registry
        self._shadows = shadows
        self._hub = hub

    async def register(self, body: RegisterRequest) -> RevisionView:
        """Raises AdapterRejected, PathRefused, NameTaken, and BadRequest or HubUnreachable for the hub."""
        if body.path is not None:
            revision = await self._registry.register(body.name, Path(body.path), body.label)
        else:
            assert body.hub_id is not None  # the body has one of both
            revision = await self._register_from_hub(body, body.hub_id)
        return revision_view(self._registry, revision)

    async def _register_from_hub(self, body: RegisterRequest, hub_id: str) -> Revision:
        """The files pass through the state, whose file system has to have room for them anyway, where starts sweep."""
        with tempfile.TemporaryDirectory(prefix="hub-", dir=self._registry.directory / REVISIONS) as directory:
            files = Path(directory) / "adapter"
            await asyncio.to_thread(download, hub_id, body.hub_revision, files, self._hub)
            return await self._registry.register(body.name, Path(hub_id), body.label, downloaded=files)

    async def revisions(self) -> RevisionList:
        refusals = await self._registry.refusals()
        return RevisionList(
            data=[revision_view(self._registry, revision) for revision in self._registry.revisions()],
            refusals=[refusal_view(refusal) for refusal in refusals],
        )

    async def inspect(self, revision_id: str) -> InspectedRevision:
        revision, manifest = self._find(revision_id), None
        if revision.status is RevisionStatus.ADMITTED:
            lease = self._registry.lease(f"{revision.name}@{revision.digest}")  # so that its files stay
            try:
                manifest = await asyncio.to_thread(read_manifest, lease.model.variant.path)
            finally:
                lease.release()
        return inspected_view(self._registry, revision, manifest)

    async def pin(self, revision_id: str, pinned: bool) -> RevisionView:
        found = self._find(revision_id)
        return revision_view(self._registry, await self._registry.pin(found.name, found.digest, pinned))

    async def retire(self, revision_id: str, wait_s: float) -> tuple[bool, RevisionView]:
        """Says whether it is freed by now; the drain goes on, whether its asker waits or not."""
        found = self._find(revision_id)
        revision = await self._registry.retire(found.name, found.digest, wait_s)
        return revision.status is RevisionStatus.RETIRED, revision_view(self._registry, revision)

    def labels(self) -> LabelList:
        return LabelList(data=[label_view(label) for label in self._registry.labels()])

    async def promote(self, alias: str, body: PromoteRequest) -> LabelView:
        name, label = _parts(alias)
        return label_view(await self._registry.promote(name, label, body.digest, body.expected))

    async def roll_back(self, alias: str) -> LabelView:
        return label_view(await self._registry.roll_back(*_parts(alias)))

    async def remove_label(self, alias: str) -> Deleted:
        await self._registry.remove_label(*_parts(alias))
        return Deleted(id=alias)

    def policy(self, name: str) -> PolicyView:
        policy = self._registry.policy(name)
        if policy is None:
            raise ModelNotFound(f"{name[:200]!r} has no policy; PUT one, its default label answers", param="name")
        return policy_view(name, policy)

    async def set_policy(self, name: str, body: PolicyRequest) -> PolicyView:
        policy = Policy(body.weights, body.sticky, body.shadow)
        await self._registry.set_policy(name, policy)
        return policy_view(name, policy)

    async def remove_policy(self, name: str) -> Deleted:
        self.policy(name)
        await self._registry.set_policy(name, None)
        return Deleted(id=name)

    async def shadows(self, name: str) -> ShadowReport:
        """Raises ModelNotFound for a name that no revision was ever registered under."""
        if not any(revision.name == name for revision in self._registry.revisions()):
            raise ModelNotFound(f"no revision is called {name[:200]!r}; GET /admin/revisions lists them", param="name")
        comparisons = await asyncio.to_thread(self._shadows.log.compare, name)
        return ShadowReport(name=name, outcomes=self._shadows.outcomes(name), comparisons=comparisons)

    def _find(self, revision_id: str) -> Revision:
        name, at, digest = revision_id.rpartition("@")
        if not (at and name and digest):
            raise BadRequest(
                f"revision {revision_id[:200]!r} is not name@digest; GET /admin/revisions lists them", param="revision"
            )
        return self._registry.revision(name, digest)


def _parts(alias: str) -> tuple[str, str]:
    name, colon, label = alias.rpartition(":")
    if not (colon and name and label):
        raise BadRequest(
            f"label {alias[:200]!r} is not name:label, for example starter:canary; GET /admin/labels lists them",
            param="label",
        )
    return name, label
