"""Every error a client can see, and its one mapping to HTTP.

GraftError
├── BadRequest 400          a field is wrong; `param` names it
│   ├── UnsupportedField    a known OpenAI field that would change the output and is not supported
│   └── ContextTooLong      code context_length_exceeded
├── ModelNotFound 404
├── BodyTooLarge 413
├── AdapterRejected 422     an adapter that must not, or cannot, run on this base
├── Overloaded 429
└── EngineDead 503
"""

from __future__ import annotations


class GraftError(Exception):
    """Carries OpenAI's error fields; `message` says what was given, what is allowed and what to do."""

    status = 500
    type = "server_error"
    code = "internal_error"

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


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class ModelNotFound(BadRequest):
    status = 404
    code = "model_not_found"


class BodyTooLarge(BadRequest):
    status = 413
    code = "body_too_large"


class AdapterRejected(BadRequest):
    status = 422
    code = "adapter_rejected"


class Overloaded(GraftError):
    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class EngineDead(GraftError):
    status = 503
    type = "server_error"
    code = "engine_dead"
