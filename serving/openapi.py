"""The OpenAPI document: FastAPI's, made true: every status that a route answers, and the envelope of its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from serving.version import graft_version

_MEANINGS: Mapping[int, str] = {
    400: "A field or header is wrong, unknown or not supported; `param` names it",
    401: "No key, or one that is not known",
    403: "The key may not use this model or route",
    404: "There is no such model, revision or label",
    408: "The body did not come in time",
    409: "The registry is not in the state that the change needs",
    413: "The body is over the limit",
    422: "The adapter must not, or cannot, run on this base; `reasons` says why",
    429: "The server has too much to do, or the key has used its share",
    500: "A bug of the server",
    502: "The hub cannot be reached",
    503: "The weights are still loading, the engine failed, or the server stops",
    504: "The time that the request may take is over",
}
# By the beginning of a path; the first that fits. A new resource needs a line here.
_ANSWERS: Sequence[tuple[str, tuple[int, ...]]] = (
    ("/healthz", (503,)),
    ("/readyz", (503,)),
    ("/metrics", (400, 401, 403)),
    ("/admin/", (400, 401, 403, 404, 409, 422, 502, 503)),
    ("/v1/models/", (400, 401, 403, 404)),
    ("/v1/models", (400, 401)),
    ("/tokenize", (400, 401, 403, 404, 429, 503)),
    ("/v1/", (400, 401, 403, 404, 429, 503, 504)),
)
_ANYWHERE = (408, 413, 500)
_RETRIED = (429, 503)
_FASTAPIS_OWN = ("HTTPValidationError", "ValidationError")  # this server answers 400, with its own envelope
_ENVELOPE = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorEnvelope"}}}
_REQUEST_ID = {"description": "The request's id, as given or made", "required": True, "schema": {"type": "string"}}
_RETRY_AFTER = {"description": "When to try again, in seconds, where that is known", "schema": {"type": "integer"}}
_TIMEOUT = {
    "name": "x-request-timeout-s",
    "in": "header",
    "description": "How long the answer may take, in seconds; the server's own limit counts where that is less",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}


class ErrorDetail(BaseModel):
    """What OpenAI's clients read of an error."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str
    reasons: list[str] = Field(default_factory=list, description="Of a refused adapter, one by one")


class ErrorEnvelope(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    error: ErrorDetail


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """Completes FastAPI's document in place, and as often as it is called; raises KeyError for an unlisted path."""
    document["info"]["version"] = graft_version()
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in _FASTAPIS_OWN:
        schemas.pop(name, None)
    for model in (ErrorDetail, ErrorEnvelope):
        schemas[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas[model.__name__].pop("$defs", None)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(operation, _statuses(path))
    return document


def events_of(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Returns a route's `responses` for the streamed form of its answer."""
    text = "Server-sent events: each `data:` line is a chunk in JSON; [DONE] or one error envelope is the last."
    schema = {"type": "string", "description": text, "x-event-schema": chunk.model_json_schema(mode="serialization")}
    return {200: {"description": "The answer, or its events", "content": {"text/event-stream": {"schema": schema}}}}


def _statuses(path: str) -> tuple[int, ...]:
    for beginning, statuses in _ANSWERS:
        if path.startswith(beginning):
            return tuple(sorted((*statuses, *_ANYWHERE)))
    raise KeyError(f"serving/openapi.py lists no answers of {path}; add them")


def _complete(operation: dict[str, Any], statuses: tuple[int, ...]) -> None:
    answers = operation["responses"]
    if "422" in answers and 422 not in statuses:
        del answers["422"]
    for status in statuses:
        answers[str(status)] = {"description": _MEANINGS[status], "content": _ENVELOPE}
    for status, answer in answers.items():
        answer["headers"] = {"x-request-id": _REQUEST_ID}
        if int(status) in _RETRIED:
            answer["headers"]["retry-after"] = _RETRY_AFTER
    parameters = operation.setdefault("parameters", [])
    if 400 in statuses and _TIMEOUT not in parameters:
        parameters.append(_TIMEOUT)
