"""A real server process over a FakeEngine, forked from a server that has imported everything once."""

from __future__ import annotations

import socket
from multiprocessing.connection import Connection
from pathlib import Path

PRELOAD = ["tests.integration.killed_server", "tests.tiny", "serving.keys"]


def serve(base: str, state: str, root: str, keys: str, port: Connection) -> None:
    """Serves until it is killed; sends the port it listens on."""
    import uvicorn

    from serving.keys import KeyRing
    from tests.tiny import make_fake_app

    app, _ = make_fake_app(
        Path(base), {}, keys=KeyRing(Path(keys)), state=Path(state), adapter_roots=[Path(root)], token_delay_s=0.001
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port.send(listener.getsockname()[1])
        uvicorn.Server(uvicorn.Config(app, log_config=None)).run(sockets=[listener])
