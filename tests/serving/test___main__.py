"""The process starts, drains on SIGTERM, and says in one line why it cannot start."""

from __future__ import annotations

import asyncio
import gc
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
import pytest
import torch

from serving import __main__ as command
from serving.__main__ import EXIT_ENGINE_DIED, choose_engine, main, make_engine
from serving.config import ConfigError, read_config
from serving.engine import number_format
from serving.engine.fake_engine import FakeEngine
from serving.engine.transformers_engine import TransformersEngine
from serving.engine.vllm_engine import VllmEngine
from serving.errors import ModelRejected
from serving.registry.boot import open_registry
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


def test_a_port_that_another_has_is_told_as_such(tiny_base, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["--base", str(tiny_base), "--engine", "fake", "--port", str(port)]) == 2
    printed = capsys.readouterr()
    assert f"--port {port}: cannot listen there" in printed.err
    assert "serving" not in printed.out


def test_what_is_loaded_is_taken_out_of_garbage_collection():
    try:
        command.keep_heap()
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


def test_the_events_of_a_stream_do_not_wait_for_each_others_acknowledgement(tiny_base):
    config = read_config(["--base", str(tiny_base), "--port", "0"], {})
    with command._listen(config) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_engine_is_the_one_that_was_asked_for(tiny_base):
    config = read_config(["--base", str(tiny_base), "--engine", "fake", "--max-batch", "3"], {})
    engine = make_engine(config, open_registry("base", tiny_base))
    assert isinstance(engine, FakeEngine)
    assert (engine.context_length, engine.max_batch) == (512, 3)


def test_the_cache_has_the_size_that_was_asked_for(tiny_base):
    arguments = ["--base", str(tiny_base), "--cache-gib", "0.0001"]
    engine = make_engine(read_config([*arguments, "--engine", "transformers"], {}), open_registry("base", tiny_base))
    with pytest.raises(ValueError, match=r"0.00 GiB may be used: .* raise --cache-gib"):
        asyncio.run(engine.start())
    with pytest.raises(ConfigError, match=r"--cache-gib 0.0001: the fake engine has no cache; remove it"):
        make_engine(read_config([*arguments, "--engine", "fake"], {}), open_registry("base", tiny_base))


def test_weights_in_fewer_bits_are_the_transformers_engines(tiny_base, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(command, "find_spec", lambda package: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    registry = open_registry("base", tiny_base)
    for weights in ("nf4", "fp16"):
        config = read_config(["--base", str(tiny_base)], {"GRAFT_WEIGHTS": weights})
        assert choose_engine(config) == "transformers"
        assert f"--weights {weights} is the transformers engine's" in caplog.text
        for name, reason in (("fake", "has no weights"), ("vllm", "plain weights only")):
            asked = config.model_copy(update={"engine": name})
            with pytest.raises(ConfigError, match=rf"--weights {weights}: the {name} engine .*{reason}; .*--engine tr"):
                make_engine(asked, registry)


def test_a_format_that_cannot_be_had_ends_the_start_with_2(tiny_base, monkeypatch, capsys):
    monkeypatch.setattr(number_format, "find_spec", lambda package: None)
    assert main(["--base", str(tiny_base), "--engine", "transformers", "--weights", "nf4"]) == 2
    assert "pip install accelerate bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "cuda", "merged", "name", "reason"),
    [
        (True, True, False, "vllm", "vLLM is installed and there is CUDA"),
        (False, True, False, "transformers", "not installed"),
        (True, False, False, "transformers", "no CUDA"),
        (True, True, True, "transformers", "merged"),
    ],
)
def test_auto_is_vllm_wherever_it_runs_all_that_is_asked(
    tiny_base, monkeypatch, caplog, installed, cuda, merged, name, reason
):
    monkeypatch.setattr(command, "find_spec", lambda package: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    caplog.set_level("INFO")
    arguments = ["--base", str(tiny_base), *(["--merged", f"m={tiny_base}"] if merged else [])]
    assert choose_engine(read_config(arguments, {})) == name
    assert f"engine auto: {name}" in caplog.text
    assert reason in caplog.text


def test_auto_is_transformers_without_cuda(tiny_base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = make_engine(read_config(["--base", str(tiny_base)], {}), open_registry("base", tiny_base))
    assert isinstance(engine, TransformersEngine)


def test_vllm_is_refused_where_it_is_not_installed_or_a_merged_model_is_asked_for(tiny_base, monkeypatch):
    registry = open_registry("base", tiny_base)
    arguments = ["--base", str(tiny_base), "--engine", "vllm"]
    monkeypatch.setattr(command, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match="make deploy ENGINE=vllm"):
        make_engine(read_config(arguments, {}), registry)
    monkeypatch.setattr(command, "find_spec", lambda package: object())
    with pytest.raises(ModelRejected, match="merged model 'm': vLLM runs one set of weights"):
        make_engine(read_config([*arguments, "--merged", f"m={tiny_base}"], {}), registry)


def test_vllm_has_a_slot_for_each_adapter_there_can_be_as_wide_as_the_widest(tiny_base, tiny_adapters, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda package: object())
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "")  # so that its absence is what is restored
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    arguments = ["--base", str(tiny_base), "--engine", "vllm"]
    for adapters, words, slots in (
        ({}, [], 0),
        (tiny_adapters, [], 2),
        (tiny_adapters, ["--max-adapters", "1"], 1),
        ({}, ["--keys", "keys.toml", "--max-adapters", "5"], 5),  # an administrator may register as many
    ):
        registry = open_registry("base", tiny_base, adapters=adapters, max_rank=24)
        engine = make_engine(read_config([*arguments, *words], {}), registry)
        assert isinstance(engine, VllmEngine)
        assert (engine.max_adapters, engine.max_rank) == (slots, 24)
    assert os.environ["VLLM_NO_USAGE_STATS"] == "0", "what the operator set stands"
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


@contextmanager
def server_process(*arguments, code=None):
    """Yields the process and its URL, as it says it; `code` stands in for `-m serving`."""
    environment = {**os.environ, "GRAFT_PORT": "0", "OMP_NUM_THREADS": "1"}
    program = ["-m", "serving"] if code is None else ["-c", code]
    command = [sys.executable, *program, "--engine", "fake", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().split(" on ")[1].strip()
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
    with server_process("--base", str(tiny_base), "--max-batch", "1", "--drain-s", drain_s) as (process, url):
        wait_until(lambda: is_ready(url), timeout_s=120)
        lines = []

        def read():
            body = {"model": "base", "prompt": ["b"] * 8, "max_tokens": 100, "temperature": 0, "stream": True}
            try:
                with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
                    lines.extend(line for line in response.iter_lines() if line)
            except httpx.TransportError:
                pass  # the cut that drain 0 means

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: len(lines) > 2)
        process.send_signal(signal.SIGTERM)
        assert not is_ready(url), "from the signal on"
        _, errors = process.communicate(timeout=60)
        reader.join(timeout=30)
        assert process.returncode == 0
        assert (lines[-1] == "data: [DONE]") is finishes
        record = json.loads(next(line for line in errors.splitlines() if '"/v1/completions"' in line))
        assert (record["model"], record["prompt_tokens"]) == ("base", 8)


MORTAL = """
import signal, sys
from serving import __main__ as command
from serving.engine.fake_engine import FakeEngine

async def start(engine, really=FakeEngine.start):
    await really(engine)
    signal.signal(signal.SIGUSR1, lambda *_: engine.die("it was shot"))

FakeEngine.start = start
sys.exit(command.main(sys.argv[1:]))
"""


def test_the_engines_death_ends_the_process_with_70_and_its_streams_with_an_error(tiny_base):
    assert EXIT_ENGINE_DIED == 70
    with server_process("--base", str(tiny_base), code=MORTAL) as (process, url):
        wait_until(lambda: is_ready(url), timeout_s=120)
        body = {"model": "base", "prompt": "a", "max_tokens": 400, "temperature": 0, "n": 8, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            process.send_signal(signal.SIGUSR1)
            last = list(lines)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        _, errors = process.communicate(timeout=60)
        assert process.returncode == EXIT_ENGINE_DIED
        assert "python -m serving: the engine failed; start the server again" in errors.splitlines()
