"""The server process: reads the flags, opens the registry, chooses the engine, runs until it is told to stop."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from types import FrameType

import uvicorn

from serving.app import create_app
from serving.config import ConfigError, ServeConfig, read_config
from serving.engine.engine import Engine, WeightFormat
from serving.errors import GraftError
from serving.keys import KeyRing
from serving.logs import log_as_json
from serving.registry.base import LoadedBase
from serving.registry.boot import open_registry
from serving.registry.registry import Registry
from serving.tracing import traced

logger = logging.getLogger("graft.server")

EXIT_USAGE = 2
EXIT_ENGINE_DIED = 70  # EX_SOFTWARE of sysexits.h: a supervisor starts the server again
FAKE_TOKEN_DELAY_S = 0.01


def main(arguments: Sequence[str]) -> int:
    """Returns 0 after a stop that was asked for; with one message 2 where the server cannot start, 70 where it died."""
    try:
        config = read_config(arguments)
        log_as_json(config.log_level)
        return serve(config)
    except (ConfigError, GraftError) as error:
        print(f"python -m serving: {error}", file=sys.stderr)
        return EXIT_USAGE


def serve(config: ServeConfig) -> int:
    """Raises ModelRejected or AdapterRejected where a directory cannot be served."""
    registry = _open_registry(config)
    keys = None if config.keys is None else KeyRing(config.keys)
    failures: list[Exception] = []
    deaths: list[bool] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    def die() -> None:
        deaths.append(True)
        server.should_exit = True

    app = create_app(
        engine=make_engine(config, registry),
        registry=registry,
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        body_limit_bytes=int(config.body_limit_mib * 2**20),
        keys=keys,
        deadline_s=config.deadline_s,
        stall_s=config.stall_s,
        on_ready=keep_heap,
        on_failure=fail,
        on_death=die,
        stopping=lambda: server.should_exit,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # the app writes its own
            timeout_graceful_shutdown=config.drain_s,
        )
    )
    models = ", ".join(model.revision for model in registry.served().values())
    with _listen(config) as listener, suppress(KeyboardInterrupt), traced(app, config.otlp_endpoint):
        print(f"serving {models} on http://{config.host}:{listener.getsockname()[1]}", flush=True)
        server.run(sockets=[listener])
    if failures:
        print(f"python -m serving: the engine did not start: {failures[0]}", file=sys.stderr)
        return EXIT_USAGE
    if deaths:
        print("python -m serving: the engine failed; start the server again", file=sys.stderr)
        return EXIT_ENGINE_DIED
    return 0


def keep_heap() -> None:
    """Takes all that is loaded by now out of garbage collection: to look at it took 0.3 s and held up every stream."""
    gc.collect()
    gc.freeze()


def _listen(config: ServeConfig) -> socket.socket:
    """Raises ConfigError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--host {config.host} --port {config.port}: cannot listen there ({error.strerror}); stop what does, or "
            "give another"
        ) from error
    # Connections inherit it. asyncio sets it for listeners of its own alone; without it each event of a stream can wait
    # 40 ms for the client's acknowledgement of the one before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _open_registry(config: ServeConfig) -> Registry:
    return open_registry(
        config.base_name,
        config.base,
        adapters=config.adapters,
        merged=config.merged,
        state_dir=config.state,
        adapter_roots=config.adapter_roots,
        max_adapters=config.max_adapters,
        max_rank=config.max_rank,
        weights=WeightFormat(config.weights),
    )


def make_engine(config: ServeConfig, registry: Registry) -> Engine:
    """Imports only the engine that runs. Raises ConfigError or ModelRejected where it cannot run what is asked."""
    name = choose_engine(config) if config.engine == "auto" else config.engine
    base = registry.base
    context_length = base.context_length(config.context_length)
    if config.cache_gib is not None and name == "fake":
        raise ConfigError(f"--cache-gib {config.cache_gib}: the fake engine has no cache; remove it")
    cache_bytes = None if config.cache_gib is None else int(config.cache_gib * 2**30)
    if config.weights != "plain" and name != "transformers":
        why = "has no weights" if name == "fake" else "is started here on plain weights only"
        raise ConfigError(f"--weights {config.weights}: the {name} engine {why}; remove it, or --engine transformers")
    if name == "fake":
        return _make_fake_engine(config, base, context_length)
    if name == "vllm":
        return _make_vllm_engine(config, registry, context_length, cache_bytes)
    from serving.engine.transformers_engine import TransformersEngine

    return TransformersEngine(
        base.directory,
        max_batch=config.max_batch,
        context_length=context_length,
        cache_bytes=cache_bytes,
        weights=base.weights,
    )


def choose_engine(config: ServeConfig) -> str:
    """Returns what `--engine auto` means here, and logs why: vLLM wherever it runs all that is asked."""
    reason = None
    if find_spec("vllm") is None:
        reason = "vLLM is not installed"
    elif config.weights != "plain":
        reason = f"--weights {config.weights} is the transformers engine's"
    elif config.merged:
        reason = "a merged model is served, and vLLM runs one set of weights"
    else:
        import torch

        if not torch.cuda.is_available():
            reason = "there is no CUDA"
    name = "vllm" if reason is None else "transformers"
    logger.info("engine auto: %s (%s)", name, reason or "vLLM is installed and there is CUDA")
    return name


def _make_fake_engine(config: ServeConfig, base: LoadedBase, context_length: int) -> Engine:
    from serving.engine.fake_engine import FakeEngine
    from training.chat import end_of_turn_id

    return FakeEngine(
        context_length=context_length,
        vocabulary_size=base.vocabulary.size,
        max_batch=config.max_batch,
        token_delay_s=FAKE_TOKEN_DELAY_S,
        control_ids=base.vocabulary.controls,
        end_of_turn_id=end_of_turn_id(base.tokenizer),
    )


def _make_vllm_engine(config: ServeConfig, registry: Registry, context_length: int, cache_bytes: int | None) -> Engine:
    """vLLM sizes its adapter slots at the start: without keys nobody can register more adapters than there are."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "--engine vllm: vLLM is not installed here; install it (make deploy ENGINE=vllm does), or choose "
            "--engine transformers"
        )
    from serving.engine.vllm_engine import ENVIRONMENT, VllmEngine, refuse_merged

    if config.merged:
        raise refuse_merged(next(iter(config.merged)))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return VllmEngine(
        registry.base.directory,
        max_batch=config.max_batch,
        context_length=context_length,
        max_adapters=min(config.max_adapters, registry.adapters()) if config.keys is None else config.max_adapters,
        max_rank=registry.max_rank,
        cache_bytes=cache_bytes,
    )


def _stop_quietly(signal_number: int, frame: FrameType | None) -> None:
    """uvicorn raises the signal again after its drain; by then leaving is all that is left to do."""
    raise SystemExit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop_quietly)
    sys.exit(main(sys.argv[1:]))
