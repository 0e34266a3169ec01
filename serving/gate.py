"""The gate: who sends a request, whether and how often that key may, and how long the answer may take."""

from __future__ import annotations

import math
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.auth import ANONYMOUS, Caller, check_admin, check_metrics
from serving.errors import BadRequest, GraftError, RateLimited
from serving.keys import KeyRing
from serving.limits import Limiter
from serving.middleware import RequestFacts, error_response

PUBLIC = frozenset(("/healthz", "/readyz"))
TIMEOUT_HEADER = "x-request-timeout-s"


class Gate:
    """Stands before every route, so that one without a key is not forgotten; refused bodies are never read.

    Without a key ring everyone is ANONYMOUS. Every POST outside /admin counts as a request of its key.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing | None, limiter: Limiter, deadline_s: float) -> None:
        self._app = app
        self._keys = keys
        self._limiter = limiter
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC:
            await self._app(scope, receive, send)
            return
        facts: RequestFacts = scope["state"]["facts"]
        try:
            headers = Headers(scope=scope)
            facts.caller = self._caller(headers)
            is_inference = _check_route(facts.caller, scope)
            facts.timeout_s = self._timeout_s(headers)
        except GraftError as error:
            await error_response(error)(scope, receive, send)
            return
        if is_inference:
            await self._count(facts.caller, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _count(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._limiter.headers(caller))
            await send(message)

        try:
            with self._limiter.request(caller):
                await self._app(scope, receive, send_limits)
        except RateLimited as error:
            await error_response(error)(scope, receive, send_limits)

    def _caller(self, headers: Headers) -> Caller:
        return ANONYMOUS if self._keys is None else self._keys.caller(headers.get("authorization", ""))

    def _timeout_s(self, headers: Headers) -> float:
        given = headers.get(TIMEOUT_HEADER)
        if given is None:
            return self._deadline_s
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise BadRequest(
                f"{TIMEOUT_HEADER} {given[:40]!r} is no time; give seconds above 0, at most {self._deadline_s:g} count",
                param=TIMEOUT_HEADER,
            )
        return min(seconds, self._deadline_s)


def _check_route(caller: Caller, scope: Scope) -> bool:
    """Says whether the request is one for a model; raises Forbidden where the key may not use the route."""
    path = scope["path"]
    if path == "/admin" or path.startswith("/admin/"):
        check_admin(caller)
        return False
    if path == "/metrics":
        check_metrics(caller)
    return bool(scope["method"] == "POST")


def described(schema: dict[str, Any]) -> dict[str, Any]:
    """Adds the key to an OpenAPI document, in place: every operation needs it but the probes."""
    schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in PUBLIC else [{"key": []}]
    return schema
