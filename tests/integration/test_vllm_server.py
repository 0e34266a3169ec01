"""A server on the real vLLM: revisions come and go, its process stalls and dies, OpenAI's client is answered."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
from fastapi import FastAPI

from serving.app import create_app
from serving.engine.vllm_engine import VllmEngine
from serving.registry.boot import open_registry
from tests.serving.engine.on_vllm import NEEDS_VLLM, engine_process, make_engine, make_wide_model, vllm_environment
from tests.serving.managed import Managed, managed_server
from tests.serving.registry.adapters import change_config, change_tensors
from tests.tiny import make_tiny_adapter, wait_until
from training.artifact import read_manifest

ROOT = Path(__file__).resolve().parents[2]
PLACES = 2
ENDLESS = {"max_tokens": 300, "logit_bias": {"2": -100}}  # never the end of turn
pytestmark = NEEDS_VLLM


class Inspected(VllmEngine):
    """Tells what vLLM's own process holds, and what it has been asked and not answered."""

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await super().start()

    def held(self) -> int:
        return len(asyncio.run_coroutine_threadsafe(self._llm.list_loras(), self._loop).result(timeout=60))

    def unanswered(self) -> int:
        return len(self._llm.engine_core.utility_results)


def make_vllm_app(
    base: Path, adapters: dict[str, Path], *, state: Path, adapter_roots: list[Path], **app
) -> tuple[FastAPI, VllmEngine]:
    registry = open_registry(
        "base", base, adapters=adapters, state_dir=state, adapter_roots=adapter_roots, max_adapters=PLACES
    )
    engine = make_engine(base, Inspected, max_batch=2, max_adapters=PLACES, max_rank=registry.max_rank)
    return create_app(engine=engine, registry=registry, max_batch=2, **app), engine


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_wide_model(tmp_path_factory.mktemp("wide") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory) -> dict[str, Path]:
    """Three that are right, and those that the gate has to find out on the engine itself."""
    root = tmp_path_factory.mktemp("adapters")
    made = {name: make_tiny_adapter(base, root / name, name, seed) for seed, name in enumerate("abc", 1)}
    for name in ("nothing", "scaled", "patterned"):
        made[name] = shutil.copytree(made["a"], root / name)
    change_tensors(
        made["nothing"], lambda found: {k: torch.zeros_like(t) if "_B" in k else t for k, t in found.items()}
    )
    change_tensors(made["scaled"], lambda found: {k: t * 1.5 if "_B" in k else t for k, t in found.items()})
    change_config(made["patterned"], rank_pattern={"q_proj": 4})
    return made


@pytest.fixture(scope="module")
def deaths() -> list[str]:
    return []


@pytest.fixture(scope="module")
def managed(base: Path, adapters: dict[str, Path], deaths: list[str], tmp_path_factory) -> Iterator[Managed]:
    directory = tmp_path_factory.mktemp("managed")
    options = {"stall_s": 10.0, "on_death": lambda: deaths.append("died")}
    with vllm_environment(), managed_server(base, adapters, directory, make_vllm_app, **options) as managed:
        yield managed


def retire(managed: Managed, revision: str, wait_s: int = 30) -> httpx.Response:
    return managed.admin.delete(f"/admin/revisions/{revision}?wait_s={wait_s}")


def ready(managed: Managed) -> int:
    return managed.user.get("/readyz").status_code


def test_the_gate_admits_what_vllm_computes_as_peft_did_and_frees_what_it_refuses(managed):
    revision = managed.register("right", "a")
    assert revision["probe"]["reference"] == "matched"
    assert revision["probe"]["from_reference_nats"] < 1e-4 < revision["probe"]["from_base_nats"]
    for path, reason in (
        ("nothing", "it changes nothing"),
        ("scaled", "from those that peft computed"),
        ("patterned", "not every vLLM honours rank_pattern"),
    ):
        refused = managed.admin.post("/admin/revisions", json={"name": "wrong", "path": path})
        assert (refused.status_code, reason in refused.text) == (422, True), refused.text
    assert managed.engine.held() == 1
    assert retire(managed, revision["id"]).status_code == 200
    assert managed.engine.held() == 0


def test_more_revisions_than_places_all_answer_and_the_retired_leave_vllm(managed):
    made = [managed.register(name, name) for name in "abc"]
    said = {each["id"]: text(managed, each["id"]) for each in made}
    assert len({*said.values(), text(managed, "base")}) == 4
    assert {revision: text(managed, revision) for revision in said} == said, "however often they change places"
    assert managed.engine.held() == PLACES
    with managed.stream(made[0]["id"], **ENDLESS) as chunks:
        next(chunks)
        assert retire(managed, made[0]["id"], wait_s=0).status_code == 202
        assert managed.engine.held() > 0
        parts = list(chunks)
    assert parts[-1]["choices"][0]["finish_reason"] == "length", "it ends on the revision it began with"
    assert [retire(managed, each["id"]).status_code for each in made] == [200] * 3
    assert managed.engine.held() == 0


def text(managed: Managed, model: str) -> str:
    answer = managed.chat(model, max_tokens=24, logit_bias=ENDLESS["logit_bias"]).json()
    assert answer["model"] == model
    return answer["choices"][0]["message"]["content"]


def test_an_answer_says_how_long_it_waited_for_a_row(managed):
    timing = managed.chat("base").headers["server-timing"]
    assert re.fullmatch(r"queue;dur=[\d.]+, ttft;dur=[\d.]+, total;dur=[\d.]+", timing)


def test_logprobs_beside_a_response_format_are_a_400(managed):
    answer = managed.chat("base", response_format={"type": "json_object"}, logprobs=True)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs"), answer.text


def test_a_process_that_makes_no_step_is_a_stall_until_it_goes_on(managed):
    with managed.stream("base", **ENDLESS) as chunks:
        next(chunks)
        process = engine_process(os.getpid())
        process.suspend()
        try:
            wait_until(lambda: ready(managed) == 503, timeout_s=120)
            assert managed.chat("base").json()["error"]["code"] == "engine_stalled"
        finally:
            process.resume()
        assert list(chunks)[-1]["choices"][0]["finish_reason"] == "length"
    wait_until(lambda: ready(managed) == 200, timeout_s=120)


def test_a_killed_process_is_a_503_for_whoever_asked_and_asks(managed, deaths):
    """The last on this server."""
    with managed.stream("base", **ENDLESS) as chunks, ThreadPoolExecutor(1) as pool:
        next(chunks)
        process = engine_process(os.getpid())
        process.suspend()
        loading = pool.submit(managed.admin.post, "/admin/revisions", json={"name": "late", "path": "a"})
        wait_until(managed.engine.unanswered)
        process.kill()
        assert list(chunks)[-1]["error"]["code"] == "engine_dead"
        assert (loading.result().status_code, loading.result().json()["error"]["code"]) == (503, "engine_dead")
    assert ready(managed) == 503
    answer = managed.chat("base")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert "the server has to be restarted" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]
    wait_until(lambda: deaths == ["died"])


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen
    url: str
    log: Path


def start_server(folder: Path, base: Path, *words: str) -> Server:
    """Returns once the process runs, not once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, "-m", "serving", "--engine", "vllm", "--base", str(base), "--port", str(port), *words]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    return Server(process, f"http://127.0.0.1:{port}", log)


@contextmanager
def ready_server(folder: Path, base: Path, adapter: Path) -> Iterator[Server]:
    words = ["--adapter", f"a={adapter}", "--cache-gib", "0.5", "--max-batch", "4"]
    server = start_server(folder, base, *words)
    try:
        with httpx.Client(base_url=server.url) as client:
            deadline = time.monotonic() + 300
            while not is_ready(client):
                assert server.process.poll() is None, server.log.read_text()
                assert time.monotonic() < deadline, server.log.read_text()
                time.sleep(0.5)
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(base: Path, adapters: dict[str, Path], tmp_path_factory) -> Iterator[Server]:
    with ready_server(tmp_path_factory.mktemp("server"), base, adapters["a"]) as server:
        yield server


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_openais_client_is_answered_by_base_adapter_and_exact_revision(server, adapters):
    revision = f"a@{read_manifest(adapters['a']).digest[:12]}"
    said = {}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert {model.id for model in client.models.list()} == {"base", "a"}
        for model in ("base", "a", revision):
            fields = {"model": model, "messages": [{"role": "user", "content": "Why?"}], "temperature": 0, "seed": 1}
            whole = client.chat.completions.create(max_tokens=24, **fields)
            parts = list(client.chat.completions.create(max_tokens=24, stream=True, **fields))
            said[model] = whole.choices[0].message.content
            assert "".join(part.choices[0].delta.content or "" for part in parts) == said[model]
            assert {whole.model, *(part.model for part in parts)} == {"base" if model == "base" else revision}
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**fields, "model": "a@000000000000"})
    assert said["base"] != said["a"] == said[revision]


def test_a_killed_process_ends_the_server_with_70_and_leaves_none_behind(server):
    """The last on this server; it is idle."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    engine_process(server.process.pid).kill()
    assert server.process.wait(timeout=120) == 70
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert "python -m serving: the engine failed; start the server again" in server.log.read_text().splitlines()


def test_sigterm_lets_a_running_stream_end_then_exits_0_and_leaves_none_behind(base, adapters, tmp_path):
    body = {"model": "a", "prompt": ["b"] * 4, "temperature": 0, "stream": True, **ENDLESS}
    with ready_server(tmp_path, base, adapters["a"]) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert engine_process(server.process.pid) in children
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=server.url) as client:
                wait_until(lambda: not is_ready(client))
            *rest, last = lines
        assert server.process.wait(timeout=120) == 0, server.log.read_text()
        assert psutil.wait_procs(children, timeout=60)[1] == []
    assert last == "data: [DONE]"
    choices = [choice for line in rest for choice in json.loads(line.removeprefix("data: "))["choices"]]
    ends = {choice["index"]: choice["finish_reason"] for choice in choices if choice["finish_reason"]}
    assert ends == dict.fromkeys(range(4), "length")


def test_a_start_that_fails_says_so_and_exits_2(base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    server = start_server(tmp_path, broken)
    try:
        assert server.process.wait(timeout=300) == 2
    finally:
        server.process.kill()
        server.process.wait()
    said = [line for line in server.log.read_text().splitlines() if line.startswith("python -m serving: ")]
    assert len(said) == 1
    assert "the engine did not start: vLLM did not start: " in said[0]
