"""The gateway's overhead: HTTP latency less the engine's own time, against a bare Starlette app, at a fixed rate.

    python -m benchmarks.gateway --base DIR

Requests leave at fixed times whatever has come back, so that a queue shows. The engine is the fake one without delays,
which answers `--max-tokens` tokens; its own time is what it takes alone, in this process. The two servers have a
process each. A round measures all three one after the other, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from benchmarks.machine import describe_machine
from serving.engine.engine import GenerationRequest, Sampling, Variant, VariantKind
from serving.engine.fake_engine import FakeEngine

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Name three ideas for a weekend in the mountains, one short line each."}]
GOAL_MEDIAN_S, GOAL_P99_S = 0.002, 0.006  # at 100 requests/s
START_S = 120.0  # a start hashes the base's weights
KEEPALIVE_S = 4.0  # uvicorn closes idle connections after 5: a request must not meet a closing one
ENGINE_RUNS = 100  # a round


class BenchmarkFailed(RuntimeError):
    """A server did not start, or a request failed: latencies of the others would be another number."""


@dataclass(frozen=True, slots=True)
class Settings:
    base: Path
    rate: float  # requests a second
    seconds: float  # of each server, over all rounds
    rounds: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Round:
    """Latencies in seconds; `late_s` is how much later than planned each request left."""

    engine_s: float
    gateway_s: tuple[float, ...]
    bare_s: tuple[float, ...]
    late_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    median_s: float
    p99_s: float


def spread(values_s: Sequence[float]) -> Spread:
    """`p99_s` is the smallest value that 99 % do not exceed."""
    return Spread(statistics.median(values_s), sorted(values_s)[math.ceil(0.99 * len(values_s)) - 1])


def bare_app() -> Starlette:
    async def answer(request: Request) -> JSONResponse:
        return JSONResponse(await request.json())

    return Starlette(routes=[Route(PATH, answer, methods=["POST"])])


def gateway_app(base: Path) -> Any:
    from serving.__main__ import keep_heap
    from serving.app import create_app
    from serving.logs import log_as_json
    from serving.registry.boot import open_registry

    log_as_json("info")  # a line a request, as the server writes it
    registry = open_registry("base", base)
    engine = FakeEngine(
        context_length=registry.base.context_length(None), vocabulary_size=registry.base.vocabulary.size
    )
    return create_app(engine=engine, registry=registry, on_ready=keep_heap)


def serve(base: Path | None, listener: socket.socket) -> None:
    """Runs in a process of its own until it is terminated; `base` None is the bare app."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        app = bare_app() if base is None else gateway_app(base)
        uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listener])


@contextmanager
def server(base: Path | None, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the URL of a server that answers, and its first answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the server's own: no 40 ms in either number
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(base, listener), daemon=True)
        process.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield url, first_answer(url, body, process.is_alive)
        finally:
            process.terminate()
            process.join()


def first_answer(url: str, body: dict[str, Any], is_alive: Callable[[], bool]) -> dict[str, Any]:
    deadline_s, said = time.monotonic() + START_S, "nothing"
    while is_alive() and time.monotonic() < deadline_s:
        with suppress(httpx.TimeoutException):  # the socket listens before anybody answers
            response = httpx.post(url + PATH, json=body, timeout=2.0, trust_env=False)
            if response.status_code == httpx.codes.OK:
                answer: dict[str, Any] = response.json()
                return answer
            said = response.text[:300]
        time.sleep(0.1)
    raise BenchmarkFailed(f"a server did not start; it said {said}")


async def run_engine(base: Path, prompt_tokens: int, max_tokens: int, rate: float) -> float:
    """Returns the seconds that the engine takes alone for one such request, the median of ENGINE_RUNS at `rate`.

    A processor that idles in between, as it does behind a server, takes a third longer than one that never stops.
    """
    vocabulary_size = int(json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    engine = FakeEngine(context_length=prompt_tokens + max_tokens, vocabulary_size=vocabulary_size)
    variant = Variant("base", VariantKind.BASE, "alone", base)
    await engine.start()
    await engine.add(variant)
    taken_s = []
    for number in range(ENGINE_RUNS):
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
        await asyncio.sleep(1 / rate)
        request = GenerationRequest(str(number), variant, tuple(range(prompt_tokens)), sampling)
        begun_s = time.perf_counter()
        async for _ in engine.generate(request):
            pass
        taken_s.append(time.perf_counter() - begun_s)
    return statistics.median(taken_s)


async def load(url: str, body: dict[str, Any], rate: float, requests: int) -> tuple[list[float], list[float]]:
    """Returns latencies, and by how much each request left late; raises BenchmarkFailed where one fails."""
    limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S)
    async with httpx.AsyncClient(base_url=url, limits=limits, trust_env=False, timeout=60) as client:
        begin_s = time.perf_counter() + 0.1

        async def ask(at_s: float) -> tuple[float, float]:
            await asyncio.sleep(at_s - time.perf_counter())
            sent_s = time.perf_counter()
            response = await client.post(PATH, json=body)
            latency_s = time.perf_counter() - sent_s
            if response.status_code != httpx.codes.OK:
                raise BenchmarkFailed(f"HTTP {response.status_code}: {response.text[:300]}")
            return latency_s, sent_s - at_s

        answers = await asyncio.gather(*(ask(begin_s + number / rate) for number in range(requests)))
    return [latency_s for latency_s, _ in answers], [late_s for _, late_s in answers]


def benchmark(settings: Settings) -> list[Round]:
    body = {"model": "base", "messages": MESSAGES, "max_tokens": settings.max_tokens, "temperature": 0}
    requests = max(1, round(settings.rate * settings.seconds / settings.rounds))
    rounds = []
    with server(settings.base, body) as (gateway, answer), server(None, body) as (bare, _):
        urls = [gateway, bare]
        for url in urls:  # warm-up
            asyncio.run(load(url, body, settings.rate, min(requests, 50)))
        for number in range(settings.rounds):
            prompt_tokens = answer["usage"]["prompt_tokens"]
            engine_s = asyncio.run(run_engine(settings.base, prompt_tokens, settings.max_tokens, settings.rate))
            measured = {
                url: asyncio.run(load(url, body, settings.rate, requests))
                for url in urls[:: 1 if number % 2 == 0 else -1]
            }
            late_s = [late for _, lates in measured.values() for late in lates]
            rounds.append(Round(engine_s, tuple(measured[gateway][0]), tuple(measured[bare][0]), tuple(late_s)))
    return rounds


def as_markdown(settings: Settings, rounds: Sequence[Round]) -> str:
    """The overhead is the row without the engine less the bare app's, which has HTTP's and the client's own cost."""
    total = spread([value for each in rounds for value in each.gateway_s])
    own = spread([value - each.engine_s for each in rounds for value in each.gateway_s])
    bare = spread([value for each in rounds for value in each.bare_s])
    over = Spread(own.median_s - bare.median_s, own.p99_s - bare.p99_s)
    late = spread([value for each in rounds for value in each.late_s])
    engine_s = statistics.median(each.engine_s for each in rounds)
    lines = ["| | median ms | p99 ms |", "|---|--:|--:|"]
    for name, row in (("the gateway", total), ("without the engine's own time", own), ("a bare Starlette app", bare)):
        lines.append(f"| {name} | {1000 * row.median_s:.2f} | {1000 * row.p99_s:.2f} |")
    lines.append(f"| **overhead** | **{1000 * over.median_s:.2f}** | **{1000 * over.p99_s:.2f}** |")
    goals = ((over.median_s, GOAL_MEDIAN_S), (over.p99_s, GOAL_P99_S))
    verdicts = ["met" if value_s <= goal_s else "missed" for value_s, goal_s in goals]
    requests = sum(len(each.gateway_s) for each in rounds)
    machine = describe_machine()
    text = (
        f"{requests} requests to each in {len(rounds)} rounds at {settings.rate:g} a second; {settings.max_tokens} "
        f"tokens a reply; the engine alone takes {1000 * engine_s:.2f} ms. Requests left {1000 * late.p99_s:.2f} ms "
        f"late (p99). Goals at 100 a second: {1000 * GOAL_MEDIAN_S:g} ms median ({verdicts[0]}), "
        f"{1000 * GOAL_P99_S:g} ms p99 ({verdicts[1]}). {machine.line}. Revision {machine.git_revision}."
    )
    return "\n".join([*lines, "", text])


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1")
    return int(text)


def parse(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a model directory; its weights are only hashed")
    parser.add_argument("--rate", type=positive, default=100.0, help="requests a second (100)")
    parser.add_argument("--seconds", type=positive, default=20.0, help="of load on each server (20)")
    parser.add_argument("--rounds", type=count, default=10, help="times that each server has a turn (10)")
    parser.add_argument("--max-tokens", type=count, default=8, help="tokens of each reply (8)")
    given = parser.parse_args(argv)
    if not (given.base / "config.json").is_file():
        parser.error(f"--base {given.base}: has no config.json; give a model's directory")
    return Settings(given.base, given.rate, given.seconds, given.rounds, given.max_tokens)


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse(argv)
    try:
        rounds = benchmark(settings)
    except (BenchmarkFailed, httpx.HTTPError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(as_markdown(settings, rounds) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
