"""The app: routes, middlewares and error answers around one engine and one catalog."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serving.chat_completions.router import chat_router
from serving.completions.router import completions_router
from serving.engine.engine import Engine
from serving.engine.host import EngineHost
from serving.errors import BadRequest, GraftError, MethodNotAllowed, NotReady, RouteNotFound
from serving.generation import Generation
from serving.metrics import Metrics
from serving.middleware import BodyLimit, JsonBodies, RequestRecorder, error_response
from serving.models.router import models_router
from serving.registry.catalog import Catalog
from serving.tokenize.router import tokenize_router
from serving.validation import bad_request


def create_app(
    *,
    engine: Engine,
    catalog: Catalog,
    max_batch: int = 32,
    max_queue: int = 256,
    body_limit_bytes: int = 4 * 2**20,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """Returns the ASGI app; its lifespan starts the engine in the background and stops it.

    `on_failure` hears of an engine that did not start; without it every inference route answers 503 then.
    """
    host = EngineHost(engine, [model.variant for model in catalog], on_failure)
    metrics = Metrics(lambda: engine.stats() if host.ready() else None)
    generation = Generation(host, catalog, metrics, max_batch=max_batch, max_queue=max_queue)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        host.start()
        try:
            yield
        finally:
            await host.stop()
            generation.close()

    app = FastAPI(
        title="Graft",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,
    )
    app.include_router(chat_router(generation))
    app.include_router(completions_router(generation))
    app.include_router(models_router(catalog))
    app.include_router(tokenize_router(generation))
    _add_probes(app, host, metrics)
    _add_error_answers(app)
    app.add_middleware(JsonBodies)
    app.add_middleware(BodyLimit, limit_bytes=body_limit_bytes)
    app.add_middleware(RequestRecorder, metrics=metrics)  # the last added is the outermost
    return app


def _add_probes(app: FastAPI, host: EngineHost, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Fails only where a restart is the one remedy."""
        with suppress(NotReady):
            host.engine()
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        host.engine()
        return {"status": "ready"}

    @app.get("/metrics")
    async def get_metrics() -> Response:
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4")


def _add_error_answers(app: FastAPI) -> None:
    """Every error leaves in OpenAI's envelope; what no handler knows is the RequestRecorder's."""

    @app.exception_handler(GraftError)
    async def graft_error(_: Request, error: GraftError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(_: Request, error: RequestValidationError) -> Response:
        return error_response(bad_request(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = error_response(_graft_error(request, error))
        response.headers.update(error.headers or {})
        return response


def _graft_error(request: Request, error: HTTPException) -> GraftError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return RouteNotFound(f"{where} does not exist; GET /openapi.json lists the routes")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return MethodNotAllowed(f"{where} is not allowed; use {allowed}")
    return BadRequest("the body cannot be read; send a JSON object in UTF-8", code="invalid_json")
