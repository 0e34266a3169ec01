"""Every error a client can see, and its one mapping to HTTP.

GraftError
├── BadRequest 400          a field is wrong; `param` names it
│   ├── UnsupportedField    a known OpenAI field that would change the output and is not supported
│   ├── UnknownField        a field that OpenAI does not have either
│   ├── ContextTooLong      code context_length_exceeded
│   ├── ModelNotFound 404
│   ├── RouteNotFound 404
│   ├── MethodNotAllowed 405
│   ├── BodyTooLarge 413
│   ├── ModelRejected 422   a base or merged directory that cannot be served
│   └── AdapterRejected 422 an adapter that must not, or cannot, run on this base
├── Overloaded 429
├── ClientClosed 499        the client left before its answer; only logs and metrics see it
├── NotReady 503            the weights are still loading
└── EngineDead 503
"""

from __future__ import annotations


class GraftError(Exception):
    """Carries OpenAI's error fields; `message` says what was given, what is allowed and what to do."""

    status = 500
    type = "server_error"
    code = "internal_error"
    retry_after_s: int | None = None  # OpenAI's client obeys at most 120

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def envelope(self) -> dict[str, dict[str, str | None]]:
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


class ModelRejected(BadRequest):
    status = 422
    code = "model_rejected"


class AdapterRejected(BadRequest):
    status = 422
    code = "adapter_rejected"


class Overloaded(GraftError):
    status = 429
    type = "rate_limit_error"
    code = "overloaded"
    retry_after_s = 2


class ClientClosed(GraftError):
    status = 499  # nginx's number for it
    type = "client_error"
    code = "client_closed_request"


class NotReady(GraftError):
    status = 503
    type = "server_error"
    code = "not_ready"
    retry_after_s = 5


class EngineDead(GraftError):
    status = 503
    type = "server_error"
    code = "engine_dead"
    retry_after_s = 10
