"""Revisions: what the server says stands behind each arm, before a run and in every reply."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, ValidationError

from evalharness.client import RETRIED_STATUSES, Client, Reply
from evalharness.errors import ServerError
from evalharness.records import Record, RecordKind, SampleStatus

DIGEST_CHARACTERS = 12  # as many as a revision shows


class _WireModel(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    revision: str | None = None
    digest: str | None = None


async def served_revisions(client: Client, arms: Sequence[str]) -> dict[str, str | None]:
    """Returns each arm's revision, None where the server tells none.

    Raises ServerError where nothing answers, or where the server lists models and knows no such arm.
    """
    listing = await client.get("/v1/models")
    _require_answer(client, listing)
    listed = _model_ids(listing)
    return {arm: await _revision(client, arm, listed) for arm in arms}


class AnswererWatch:
    """Notices when an arm's records begin to name another revision than those before."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._seen: dict[tuple[str, str], list[str]] = {}
        for record in records:
            self.see(record)

    def see(self, record: Record) -> str | None:
        """Returns what to say of a change. A server may name itself in replies but not in scores: like meets like."""
        if record.status is not SampleStatus.OK:
            return None
        kind = "scores" if record.kind is RecordKind.NLL else "replies"
        before = self._before(record.arm, kind, record.answerer)
        fingerprint = record.system_fingerprint
        other = self._before(record.arm, "fingerprint", fingerprint) if fingerprint else None
        if before is None and other is None:
            return None
        return (
            f"{record.arm}: answered by {record.answerer} from here on, by {before or other} until now, so its "
            "numbers mix revisions; measure again with another --out"
        )

    def _before(self, arm: str, what: str, name: str) -> str | None:
        """Returns the name before this one where this one is new, and not the first."""
        seen = self._seen.setdefault((arm, what), [])
        if name in seen:
            return None
        seen.append(name)
        return seen[-2] if len(seen) > 1 else None


async def _revision(client: Client, arm: str, listed: set[str]) -> str | None:
    # A server may answer to more names than it lists, so each is asked for by name.
    reply = await client.get(f"/v1/models/{quote(arm)}")
    _require_answer(client, reply)
    if reply.http_status == 404 and listed and arm not in listed:
        raise ServerError(f"--arm {arm!r}: the server has no such model; it lists {', '.join(sorted(listed))}")
    return _told(reply.body or {})


def _require_answer(client: Client, reply: Reply) -> None:
    if reply.status in {SampleStatus.UNREACHABLE, SampleStatus.TIMEOUT}:
        raise ServerError(f"--url {client.url}: no server answers ({reply.error}); start it, or give the right --url")
    if reply.http_status in {401, 403}:
        raise ServerError(f"--url {client.url}: {reply.error}; name the variable that holds the key with --api-key-env")
    if reply.http_status in RETRIED_STATUSES:
        raise ServerError(f"--url {client.url}: {reply.error}; repeat the command when the server is free")


def _told(body: dict[str, Any]) -> str | None:
    """A base or merged model keeps its name over other weights, so its digest is added."""
    try:
        model = _WireModel.model_validate(body)
    except ValidationError:  # another server's fields of these names
        return None
    digest = (model.digest or "")[:DIGEST_CHARACTERS]
    if not model.revision or not digest:
        return model.revision or digest or None
    return model.revision if digest in model.revision else f"{model.revision} ({digest})"


def _model_ids(reply: Reply) -> set[str]:
    models = (reply.body or {}).get("data")
    if not isinstance(models, list):
        return set()
    return {str(model["id"]) for model in models if isinstance(model, dict) and "id" in model}
