"""The app: routes, middlewares and error answers around one engine and one registry."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from serving.admin.router import admin_router
from serving.admin.service import Administration
from serving.chat_completions.router import chat_router
from serving.completions.router import completions_router
from serving.engine.engine import Engine, VariantKind
from serving.engine.host import STALL_S, EngineHost
from serving.errors import BadRequest, GraftError, MethodNotAllowed, NotReady, RouteNotFound
from serving.fair_queue import FairQueue
from serving.gate import Gate, described
from serving.generation import Generation
from serving.keys import KeyRing
from serving.limits import Limiter
from serving.metrics import Metrics
from serving.middleware import BodyLimit, JsonBodies, RequestRecorder, error_response
from serving.models.router import models_router
from serving.openapi import describe
from serving.registry.registry import Registry
from serving.respond import Responder
from serving.shadow import Shadows
from serving.shadow_log import ShadowLog
from serving.tokenize.router import tokenize_router
from serving.validation import bad_request


def create_app(
    *,
    engine: Engine,
    registry: Registry,
    max_batch: int = 32,
    max_queue: int = 256,
    body_limit_bytes: int = 4 * 2**20,
    keys: KeyRing | None = None,
    deadline_s: float = 600.0,
    stall_s: float = STALL_S,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] | None = None,
    on_death: Callable[[], None] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """Returns the ASGI app; its lifespan starts the engine in the background, stops it and closes the registry.

    Without `keys` anyone may ask for completions, and nobody may administer. `on_ready` is called before the first
    request runs. `on_failure` hears of an engine that did not start, `on_death` of one that failed later; without them
    every inference route answers 503 then. While `stopping` the server is not ready, and finishes what it has.
    """
    host = EngineHost(engine, _starting(registry, on_ready), on_failure, on_death=on_death, stall_s=stall_s)
    metrics = Metrics(lambda: engine.stats() if host.ready() else None, lambda: _names(registry))
    _watch_registry(metrics, registry)
    metrics.engine_stalled.set_function(host.stalled)
    queue = FairQueue(max_batch, max_queue)
    metrics.gauge_by_model("graft_queue_waiting", "Completions that wait for a row of the engine", queue.waiting)
    limiter = Limiter(lambda key, limit: metrics.rate_limited.labels(key, limit).inc())
    generation = Generation(host, registry.base.vocabulary, metrics, queue, limiter)
    log = ShadowLog(registry.directory / "shadows")
    shadows = Shadows(generation, registry, metrics, log, max_batch=max_batch)

    app = FastAPI(
        title="Graft",
        lifespan=lambda _: _running(host, shadows, registry, generation),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,
    )
    _add_resources(app, generation, registry, shadows)
    _add_probes(app, host, metrics, stopping)
    _add_error_answers(app)
    app.openapi = lambda: _document(app, keyed=keys is not None)  # type: ignore[method-assign]
    app.add_middleware(JsonBodies)
    app.add_middleware(BodyLimit, limit_bytes=body_limit_bytes)
    app.add_middleware(Gate, keys=keys, limiter=limiter, deadline_s=deadline_s)
    app.add_middleware(RequestRecorder, metrics=metrics)  # the last added is the outermost
    return app


def _starting(registry: Registry, on_ready: Callable[[], None]) -> Callable[[Engine], Awaitable[None]]:
    async def start(engine: Engine) -> None:
        await registry.start(engine)
        on_ready()

    return start


@asynccontextmanager
async def _running(
    host: EngineHost, shadows: Shadows, registry: Registry, generation: Generation
) -> AsyncIterator[None]:
    host.start()
    try:
        yield
    finally:
        await shadows.close()
        await host.stop()
        await registry.close()
        generation.close()


def _add_resources(app: FastAPI, generation: Generation, registry: Registry, shadows: Shadows) -> None:
    responder = Responder(generation, registry, shadows)
    app.include_router(chat_router(responder))
    app.include_router(completions_router(responder))
    app.include_router(models_router(registry))
    app.include_router(tokenize_router(generation, registry))
    app.include_router(admin_router(Administration(registry, shadows)))


def _document(app: FastAPI, *, keyed: bool) -> dict[str, Any]:
    document = describe(FastAPI.openapi(app))
    return described(document) if keyed else document


def _watch_registry(metrics: Metrics, registry: Registry) -> None:
    def resident() -> dict[str, float]:
        held = set(registry.residency.resident())
        return {each.id: float(each.digest in held) for each in registry.revisions() if each.live}

    metrics.gauge_by_model("graft_resident_revisions", "Revisions whose weights the engine holds", resident)
    registry.residency.on_load = metrics.load_s.observe

    def kl_nats() -> dict[str, float]:
        cost = registry.weights_cost()
        bases = [model.name for model in registry.served().values() if model.variant.kind is VariantKind.BASE]
        return {} if cost is None else dict.fromkeys(bases, cost.kl_nats)

    text = "What the format of the base's weights costs: KL from the plain ones, nats a token"
    metrics.gauge_by_model("graft_weights_kl_nats", text, kl_nats)


def _names(registry: Registry) -> set[str]:
    """Returns the names that have anything to answer with."""
    live = {each.name for each in registry.revisions() if each.live}
    return live | {model.name for model in registry.served().values()}


def _add_probes(app: FastAPI, host: EngineHost, metrics: Metrics, stopping: Callable[[], bool]) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Fails only where a restart is the one remedy."""
        with suppress(NotReady):
            host.engine()
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        host.engine()
        if stopping():
            raise NotReady("the server is stopping; ask another one", code="stopping")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
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
