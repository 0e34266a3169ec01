"""The server process: reads the flags, loads the catalog, chooses the engine, runs until it is told to stop."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn

from serving.app import create_app
from serving.config import ConfigError, ServeConfig, read_config
from serving.engine.engine import Engine
from serving.errors import GraftError
from serving.registry.base import LoadedBase
from serving.registry.catalog import load_catalog

EXIT_USAGE = 2
FAKE_TOKEN_DELAY_S = 0.01


def main(arguments: Sequence[str]) -> int:
    """Returns 0 after a stop that was asked for, and 2 with one message where the server cannot start."""
    try:
        config = read_config(arguments)
        logging.basicConfig(level=config.log_level.upper(), format="%(message)s", stream=sys.stderr)
        return serve(config)
    except (ConfigError, GraftError) as error:
        print(f"python -m serving: {error}", file=sys.stderr)
        return EXIT_USAGE


def serve(config: ServeConfig) -> int:
    """Raises ModelRejected or AdapterRejected where a directory cannot be served."""
    catalog = load_catalog(config.base_name, config.base, adapters=config.adapters, merged=config.merged)
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(
        engine=make_engine(config, catalog.base),
        catalog=catalog,
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        body_limit_bytes=int(config.body_limit_mib * 2**20),
        on_failure=fail,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=False,  # the app writes its own
            timeout_graceful_shutdown=config.drain_s,
        )
    )
    print(f"serving {', '.join(model.revision for model in catalog)} on http://{config.host}:{config.port}", flush=True)
    try:
        server.run()
    except KeyboardInterrupt:
        return 0
    if failures:
        print(f"python -m serving: the engine did not start: {failures[0]}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def make_engine(config: ServeConfig, base: LoadedBase) -> Engine:
    """Imports only the engine that runs."""
    context_length = base.context_length(config.context_length)
    if config.engine == "fake":
        from serving.engine.fake_engine import FakeEngine
        from training.chat import end_of_turn_id

        return FakeEngine(
            context_length=context_length,
            vocabulary_size=base.vocabulary.size,
            max_batch=config.max_batch,
            token_delay_s=FAKE_TOKEN_DELAY_S,
            end_of_turn_id=end_of_turn_id(base.tokenizer),
        )
    from serving.engine.transformers_engine import TransformersEngine

    return TransformersEngine(base.directory, max_batch=config.max_batch, context_length=context_length)


def _stop_quietly(signal_number: int, frame: FrameType | None) -> None:
    """uvicorn raises the signal again after its drain; by then leaving is all that is left to do."""
    raise SystemExit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop_quietly)
    sys.exit(main(sys.argv[1:]))
