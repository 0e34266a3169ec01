"""Throughput of a running server: closed-loop streams on base, adapter and mixed, in alternating rounds."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import Machine, describe_machine
from evalharness.load.plan import MIXED
from evalharness.load.prompts import load_prompts
from evalharness.load.sample import LoadSample, SampleStatus
from evalharness.load.stream import PATH, StreamWatch, chat_body

TIMEOUT_S = 600.0  # 32 streams on two cores take minutes to their last token


class BenchmarkFailed(RuntimeError):
    """A request failed: tokens a second over fewer requests would be another number."""


@dataclass(frozen=True, slots=True)
class Settings:
    url: str
    arms: tuple[str, ...]  # the first is what the others are compared with
    streams: tuple[int, ...]
    rounds: int
    requests_per_stream: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One round of one arm at one number of streams."""

    output_tokens_per_s: float
    samples: tuple[LoadSample, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """Medians: of the rounds for rates, of all requests for latencies."""

    streams: int
    arm: str
    output_tokens_per_s: float
    rounds_tokens_per_s: tuple[float, ...]
    ratio_to_first_arm: float  # median of the rounds' own ratios, so that drift between rounds cancels
    ttft_s: float | None  # None where every reply was empty
    tpot_s: float | None  # None where every reply had one token
    tokens_per_reply: float


async def ask(client: httpx.AsyncClient, arm: str, number: int, max_tokens: int) -> LoadSample:
    """Sends the prompt of that number; raises BenchmarkFailed where the reply is not whole."""
    chats = load_prompts(None)
    start, watch = time.time(), StreamWatch()
    try:
        body = chat_body(arm, chats[number % len(chats)], max_tokens)
        async with client.stream("POST", PATH, json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise BenchmarkFailed(f"{arm}: HTTP {response.status_code}: {(await response.aread())[:300]!r}")
            async for line in response.aiter_lines():
                watch.read(line)
        watch.finish()
    except httpx.RequestError as error:
        watch.fail(SampleStatus.CONNECTION, f"{type(error).__name__}: {error}")
    if watch.status is not SampleStatus.OK or watch.tokens is None:
        raise BenchmarkFailed(f"{arm}: {watch.status}: {watch.error or 'the reply has no usage'}")
    return watch.sample("benchmark", arm, start, None)


async def measure(client: httpx.AsyncClient, settings: Settings, arms: Sequence[str], streams: int) -> Measurement:
    """Runs all streams at once; with several arms they take turns, so that each has its share of every moment."""

    async def stream(number: int) -> list[LoadSample]:
        return [
            await ask(client, arms[(number + turn) % len(arms)], number + turn, settings.max_tokens)
            for turn in range(settings.requests_per_stream)
        ]

    begun = time.perf_counter()
    samples = [sample for done in await asyncio.gather(*map(stream, range(streams))) for sample in done]
    elapsed_s = time.perf_counter() - begun
    tokens = sum(sample.completion_tokens or 0 for sample in samples)
    return Measurement(tokens / elapsed_s, tuple(samples))


async def benchmark(settings: Settings) -> list[Result]:
    """Warms every arm up, then measures; every second round goes backwards, so that no arm is always first."""
    lineup: dict[str, tuple[str, ...]] = {arm: (arm,) for arm in settings.arms}
    if len(settings.arms) > 1:
        lineup[MIXED] = settings.arms
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=settings.url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        for arm in settings.arms:
            await ask(client, arm, 0, settings.max_tokens)
        results: list[Result] = []
        for streams in settings.streams:
            measured: dict[str, list[Measurement]] = {name: [] for name in lineup}
            for turn in range(settings.rounds):
                for name in list(lineup)[:: 1 if turn % 2 == 0 else -1]:
                    measured[name].append(await measure(client, settings, lineup[name], streams))
                    rate = measured[name][-1].output_tokens_per_s
                    sys.stderr.write(f"streams {streams}, round {turn + 1}, {name}: {rate:.1f} tok/s\n")
            results += [fold(streams, name, measured[name], measured[settings.arms[0]]) for name in lineup]
    return results


def fold(streams: int, arm: str, rounds: Sequence[Measurement], first_arm: Sequence[Measurement]) -> Result:
    samples = [sample for measurement in rounds for sample in measurement.samples]
    rates = tuple(measurement.output_tokens_per_s for measurement in rounds)
    ratios = [rate / other.output_tokens_per_s for rate, other in zip(rates, first_arm, strict=True)]
    return Result(
        streams=streams,
        arm=arm,
        output_tokens_per_s=statistics.median(rates),
        rounds_tokens_per_s=rates,
        ratio_to_first_arm=statistics.median(ratios),
        ttft_s=_median([sample.ttft_s for sample in samples]),
        tpot_s=_median([sample.tpot_s for sample in samples]),
        tokens_per_reply=statistics.mean(sample.completion_tokens or 0 for sample in samples),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _milliseconds(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds * 1000:.1f}"


def as_markdown(settings: Settings, machine: Machine, results: Sequence[Result]) -> str:
    first = settings.arms[0]
    lines = [
        f"| streams | arm | output tok/s | (rounds) | of {first} | TTFT ms | TPOT ms | tokens a reply |",
        "|--:|---|--:|---|--:|--:|--:|--:|",
    ]
    for result in results:
        latencies = f"{_milliseconds(result.ttft_s)} | {_milliseconds(result.tpot_s)}"
        spread = f"{min(result.rounds_tokens_per_s):.1f} to {max(result.rounds_tokens_per_s):.1f}"
        lines.append(
            f"| {result.streams} | {result.arm} | {result.output_tokens_per_s:.1f} | {spread} "
            f"| {result.ratio_to_first_arm:.2f} | {latencies} | {result.tokens_per_reply:.1f} |"
        )
    shape = (
        f"{settings.rounds} rounds of {settings.requests_per_stream} requests a stream, at most {settings.max_tokens}"
    )
    return "\n".join([*lines, "", f"Medians over {shape} tokens. {machine.line}. Revision {machine.git_revision}."])


def as_json(settings: Settings, machine: Machine, results: Sequence[Result]) -> dict[str, Any]:
    return {"machine": asdict(machine), "settings": asdict(settings), "results": [asdict(result) for result in results]}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1")
    return int(text)


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--url", required=True, help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("--arm", action="append", required=True, help="a model name; the first is compared with")
    parser.add_argument("--streams", type=positive, nargs="+", default=[1, 8, 32], help="concurrent requests")
    parser.add_argument("--rounds", type=positive, default=3, help="times that every arm is measured")
    parser.add_argument("--requests-per-stream", type=positive, default=2, help="requests one after the other")
    parser.add_argument("--max-tokens", type=positive, default=64, help="most tokens of a reply")
    parser.add_argument("--json", type=Path, help="file for the JSON; printed after the table without it")
    args = parser.parse_args(argv)
    if len(set(args.arm)) < len(args.arm) or MIXED in args.arm:
        parser.error(f"--arm {' '.join(args.arm)}: name each arm once, and none {MIXED!r}")
    url = args.url.rstrip("/").removesuffix("/v1")
    sizes = (tuple(args.streams), args.rounds, args.requests_per_stream, args.max_tokens)
    return Settings(url, tuple(args.arm), *sizes), args.json


def main(argv: Sequence[str] | None = None) -> int:
    settings, path = parse(argv)
    try:
        results = asyncio.run(benchmark(settings))
    except BenchmarkFailed as error:
        sys.stderr.write(f"error: a request to {settings.url} failed: {error}\n")
        return 1
    machine = describe_machine()
    text = json.dumps(as_json(settings, machine, results), indent=2) + "\n"
    sys.stdout.write(as_markdown(settings, machine, results) + "\n")
    if path is None:
        sys.stdout.write("\n" + text)
    else:
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
