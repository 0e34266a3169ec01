"""The whole loop, small and real: train in NF4, merge, serve, ask, evaluate, load."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = "runs/loop"
pytestmark = pytest.mark.slow


def python(*words: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRAFT_CACHE": str(ROOT / ".cache/graft")}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained adapter and its merged model."""
    folder = tmp_path_factory.mktemp("loop")
    fields = "--optim.max_steps 3 --optim.batch_size 6 --run.eval_rows 4 --run.log_every 1".split()  # noqa: SIM905
    said = python("training", "train", "smollm2-starter", "--out", FOLDER, *fields, folder=folder)
    assert "adapter starter@" in said
    said = python("training", "merge", f"{FOLDER}/adapter", "--rows", "4", folder=folder)
    assert "passed" in said
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The server as a process of its own, with base, adapter and merged model."""
    base = python("training", "base", "smollm2-starter", folder=folder).strip()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    models = ["--adapter", f"starter={FOLDER}/adapter", "--merged", f"starter-merged={FOLDER}/merged"]
    command = [sys.executable, "-m", "serving", "--base", base, *models, "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while not ready(url):
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        assert server.wait(60) == 0


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: openai.AsyncOpenAI, model: str):
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    return client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)


def test_base_adapter_and_merged_answer_at_once_as_they_do_alone(url: str):
    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            models = ["base", "starter", "starter-merged"]
            alone = [await ask(client, model) for model in models]
            together = await asyncio.gather(*(ask(client, model) for model in models * 2))
            return alone, together

    alone, together = asyncio.run(talk())
    texts = [reply.choices[0].message.content for reply in alone]
    assert [reply.choices[0].message.content for reply in together] == texts * 2
    assert texts[0] != texts[1]
    assert texts[1] == texts[2]  # the merged model is the adapter
    assert [reply.model.split("@")[0] for reply in alone] == ["base", "starter", "starter-merged"]
    assert alone[1].usage.completion_tokens == 24


def test_a_stream_says_what_the_whole_answer_says(url: str):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages = [{"role": "user", "content": "Name a fruit."}]
    options = {"model": "starter", "messages": messages, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**options).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 4


def test_the_evaluation_measures_base_against_adapter(url: str, folder: Path):
    words = ["--arm", "base", "--arm", "starter", "--held-out", f"{FOLDER}/held_out.jsonl", "--out", "runs/eval"]
    said = python("evalharness", "run", "--url", url, *words, "--limit", "4", "--max-tokens", "48", folder=folder)
    assert "ROUGE-L" in said
    report = json.loads((folder / "runs/eval/report.json").read_text())
    assert (folder / "runs/eval/report.html").stat().st_size > 10_000
    assert "perplexity" in json.dumps(report).lower()
    manifest = json.loads((folder / FOLDER / "adapter/manifest.json").read_text())
    # Three steps lower the NLL already; the served adapter must show it, as training did.
    assert manifest["loss"]["validation_last_nll_nats"] < manifest["loss"]["validation_first_nll_nats"]
    python("evalharness", "gate", "runs/eval", "--rule", "perplexity.change_percent < 0", folder=folder)


def test_locust_loads_it(url: str, folder: Path):
    words = ["--arm", "base", "--arm", "starter", "--mixed", "--users", "3", "--seconds", "6", "--max-tokens", "16"]
    python("evalharness", "load", "--url", url, *words, "--out", "runs/load", folder=folder)
    report = json.loads((folder / "runs/load/load.json").read_text())
    assert report
    lines = (folder / "runs/load/load_samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert {sample["arm"] for sample in samples} == {"base", "starter"}
    assert all(sample["error"] is None for sample in samples)
