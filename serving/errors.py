"""Every error a client can see, and its one mapping to HTTP.

GraftError
├── BadRequest 400          a field is wrong; `param` names it
│   ├── UnsupportedField    a known OpenAI field that would change the output and is not supported
│   ├── UnknownField        a field that OpenAI does not have either
│   ├── ContextTooLong      code context_length_exceeded
│   ├── Unauthorised 401    no key, or one that is not known
│   ├── Forbidden 403       the key may not do this: model_not_allowed, admin_key_required
│   ├── ModelNotFound 404
│   ├── RouteNotFound 404
│   ├── MethodNotAllowed 405
│   ├── BodyTooLarge 413
│   ├── PathRefused 400     a path that an administrator may not register from
│   ├── Conflict 409        the registry is not in the state that the change needs
│   ├── NameTaken 409       a base or merged model has the name
│   ├── ModelRejected 422   a base or merged directory that cannot be served
│   └── AdapterRejected 422 an adapter that must not, or cannot, run on this base
├── Overloaded 429          the server has too much to do
├── RateLimited 429         the key has used its share
├── BodyTooSlow 408         the request's body did not come in time
├── ClientClosed 499        the client left before its answer; only logs and metrics see it
├── NotReady 503            the weights are still loading
│   └── EngineStalled       the engine has work and makes no step
├── EngineDead 503
├── HubUnreachable 502      a model hub gave no files
├── RevisionUnavailable 503 a label points at a revision whose files no longer verify
└── DeadlineExceeded 504    the request's time is over
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class GraftError(Exception):
    """Carries OpenAI's error fields; `message` says what was given, what is allowed and what to do."""

    status = 500
    type = "server_error"
    code = "internal_error"
    retry_after_s: int | None = None  # OpenAI's client obeys at most 120
    headers: ClassVar[Mapping[str, str]] = {}  # of the answer, besides retry-after

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s

    def envelope(self) -> dict[str, dict[str, Any]]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(GraftError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedField(BadRequest):
    code = "unsupported_field"


class UnknownField(BadRequest):
    code = "unknown_field"


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class Unauthorised(BadRequest):
    status = 401
    code = "invalid_api_key"
    headers: ClassVar[Mapping[str, str]] = {"www-authenticate": 'Bearer realm="graft"'}


class Forbidden(BadRequest):
    status = 403
    code = "model_not_allowed"


class ModelNotFound(BadRequest):
    status = 404
    code = "model_not_found"


class RouteNotFound(BadRequest):
    status = 404
    code = "route_not_found"


class MethodNotAllowed(BadRequest):
    status = 405
    code = "method_not_allowed"


class BodyTooLarge(BadRequest):
    status = 413
    code = "body_too_large"


class PathRefused(BadRequest):
    code = "path_refused"


class Conflict(BadRequest):
    status = 409
    code = "conflict"
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}  # OpenAI's client would try again twice


class NameTaken(Conflict):
    code = "name_taken"


class ModelRejected(BadRequest):
    status = 422
    code = "model_rejected"


class AdapterRejected(BadRequest):
    """`reasons` are those in the message, one by one."""

    status = 422
    code = "adapter_rejected"

    def __init__(self, message: str, *, param: str | None = None, reasons: Sequence[str] = ()) -> None:
        super().__init__(message, param=param)
        self.reasons = tuple(reasons) or (message,)

    def envelope(self) -> dict[str, dict[str, Any]]:
        return {"error": {**super().envelope()["error"], "reasons": list(self.reasons)}}


class Overloaded(GraftError):
    status = 429
    type = "rate_limit_error"
    code = "overloaded"
    retry_after_s = 2


class RateLimited(GraftError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class BodyTooSlow(GraftError):
    status = 408
    type = "timeout_error"
    code = "body_too_slow"
    headers: ClassVar[Mapping[str, str]] = {"connection": "close"}  # or what still trickles in would keep it


class ClientClosed(GraftError):
    status = 499  # nginx's number for it
    type = "client_error"
    code = "client_closed_request"


class NotReady(GraftError):
    status = 503
    type = "server_error"
    code = "not_ready"
    retry_after_s = 5


class EngineStalled(NotReady):
    code = "engine_stalled"
    retry_after_s = 30


class EngineDead(GraftError):
    status = 503
    type = "server_error"
    code = "engine_dead"
    retry_after_s = 10


class HubUnreachable(GraftError):
    status = 502
    code = "hub_unreachable"
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}  # OpenAI's client would try again twice


class RevisionUnavailable(GraftError):
    status = 503
    type = "server_error"
    code = "revision_unavailable"
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}  # only an administrator can mend it


class DeadlineExceeded(GraftError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}  # OpenAI's client would wait twice more
