"""The process starts, drains on SIGTERM, and says in one line why it cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx

from serving.__main__ import main, make_engine
from serving.config import read_config
from serving.engine.fake_engine import FakeEngine
from serving.registry.base import load_base
from tests.tiny import wait_until


def test_a_start_that_fails_prints_one_message_and_exits_2(tiny_base, tiny_adapters, capsys):
    broken = tiny_adapters["starter"].parent
    for arguments, message in (
        (["--base", "/nowhere"], "--base /nowhere is no directory"),
        (["--base", str(tiny_base), "--engine", "fake", "--adapter", f"a={broken}"], "no manifest.json"),
        (["--base", str(tiny_base), "--engine", "fake", "--context-length", "9999"], "9999 is more than"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_the_engine_is_the_one_that_was_asked_for(tiny_base):
    config = read_config(["--base", str(tiny_base), "--engine", "fake", "--max-batch", "3"], {})
    engine = make_engine(config, load_base(tiny_base))
    assert isinstance(engine, FakeEngine)
    assert (engine.context_length, engine.max_batch) == (512, 3)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def server_process(*arguments):
    port = free_port()
    environment = {**os.environ, "GRAFT_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "serving", "--engine", "fake", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def is_ready(url) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_a_running_stream_has_the_drain_to_finish(tiny_base):
    with ThreadPoolExecutor(2) as pool:  # most of the time goes into imports
        list(pool.map(lambda case: check_drain(tiny_base, *case), [("20", True), ("0", False)]))


def check_drain(tiny_base, drain_s, finishes):
    with server_process("--base", str(tiny_base), "--drain-s", drain_s) as (process, url):
        wait_until(lambda: is_ready(url), timeout_s=60)
        lines = []

        def read():
            body = {"model": "base", "prompt": "a", "max_tokens": 150, "temperature": 0, "stream": True}
            try:
                with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
                    lines.extend(line for line in response.iter_lines() if line)
            except httpx.TransportError:
                pass  # the cut that drain 0 means

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: len(lines) > 2)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        reader.join(timeout=30)
        assert process.returncode == 0
        assert (lines[-1] == "data: [DONE]") is finishes
        record = json.loads(next(line for line in errors.splitlines() if '"/v1/completions"' in line))
        assert (record["model"], record["prompt_tokens"]) == ("base", 1)
