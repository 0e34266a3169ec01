"""The administration routes. A name may contain "/", so it comes first in a path and what is asked of it last."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

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
from serving.admin.service import Administration

MAX_WAIT_S = 600.0


def admin_router(administration: Administration) -> APIRouter:
    router = APIRouter(prefix="/admin", tags=["admin"])
    _add_revisions(router, administration)
    _add_labels(router, administration)
    _add_policies(router, administration)
    return router


def _add_revisions(router: APIRouter, administration: Administration) -> None:
    @router.post("/revisions", status_code=201)
    async def register_revision(body: RegisterRequest) -> RevisionView:
        """Takes an adapter through the gate; 422 with `reasons` where it must not answer."""
        return await administration.register(body)

    @router.get("/revisions")
    async def list_revisions() -> RevisionList:
        return await administration.revisions()

    @router.put("/revisions/{revision:path}/pin")
    async def pin_revision(revision: str) -> RevisionView:
        """Keeps its weights in the engine."""
        return await administration.pin(revision, True)

    @router.delete("/revisions/{revision:path}/pin")
    async def unpin_revision(revision: str) -> RevisionView:
        return await administration.pin(revision, False)

    @router.get("/revisions/{revision:path}")
    async def inspect_revision(revision: str) -> InspectedRevision:
        return await administration.inspect(revision)

    @router.delete("/revisions/{revision:path}", responses={202: {"model": RevisionView}})
    async def retire_revision(
        revision: str, response: Response, wait_s: Annotated[float, Query(ge=0, le=MAX_WAIT_S)] = 10.0
    ) -> RevisionView:
        """Drains and frees it: 200 once it is freed, 202 where requests still run after `wait_s`; that goes on."""
        retired, view = await administration.retire(revision, wait_s)
        response.status_code = 200 if retired else 202
        return view


def _add_labels(router: APIRouter, administration: Administration) -> None:
    @router.get("/labels")
    async def list_labels() -> LabelList:
        return administration.labels()

    @router.post("/labels/{alias:path}/rollback")
    async def roll_back_label(alias: str) -> LabelView:
        """Moves a label back to where it was before."""
        return await administration.roll_back(alias)

    @router.put("/labels/{alias:path}")
    async def promote_label(alias: str, body: PromoteRequest) -> LabelView:
        """Moves `name:label` to a revision; what runs ends where it began."""
        return await administration.promote(alias, body)

    @router.delete("/labels/{alias:path}")
    async def remove_label(alias: str) -> Deleted:
        return await administration.remove_label(alias)


def _add_policies(router: APIRouter, administration: Administration) -> None:
    @router.get("/policies/{name:path}")
    async def get_policy(name: str) -> PolicyView:
        return administration.policy(name)

    @router.put("/policies/{name:path}")
    async def set_policy(name: str, body: PolicyRequest) -> PolicyView:
        return await administration.set_policy(name, body)

    @router.delete("/policies/{name:path}")
    async def remove_policy(name: str) -> Deleted:
        return await administration.remove_policy(name)

    @router.get("/shadows/{name:path}")
    async def get_shadows(name: str) -> ShadowReport:
        return await administration.shadows(name)
