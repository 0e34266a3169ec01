"""The gateway benchmark: what it takes off, and one short run of the real thing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.gateway import BenchmarkFailed, Round, Settings, Spread, as_markdown, load, main, run_engine, spread

SETTINGS = Settings(Path("base"), 100.0, 20.0, 2, 8)


def test_the_99th_percentile_is_what_99_of_100_do_not_exceed():
    assert spread([float(value) for value in range(100, 0, -1)]) == Spread(50.5, 99.0)
    assert spread([3.0]) == Spread(3.0, 3.0)


def test_a_rounds_own_engine_time_and_the_bare_app_are_taken_off():
    slow = Round(0.010, (0.015,) * 50, (0.002,) * 50, (0.0,) * 100)
    fast = Round(0.001, (0.006,) * 50, (0.002,) * 50, (0.0,) * 100)
    table = as_markdown(SETTINGS, [slow, fast])
    assert "| without the engine's own time | 5.00 | 5.00 |" in table
    assert "| **overhead** | **3.00** | **3.00** |" in table
    assert "2 ms median (missed), 6 ms p99 (met)" in table
    assert "100 requests to each in 2 rounds" in table


def test_the_engine_alone_takes_time_for_each_token(tiny_base):
    short, long = (asyncio.run(run_engine(tiny_base, 20, tokens, rate=1000.0)) for tokens in (1, 64))
    assert 0 < short < long


def test_requests_leave_at_the_rate_and_one_that_fails_ends_it(fake_server):
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    latencies_s, late_s = asyncio.run(load(fake_server, body, 50.0, 10))
    assert len(latencies_s) == len(late_s) == 10
    assert min(latencies_s) > 0
    with pytest.raises(BenchmarkFailed, match="HTTP 404"):
        asyncio.run(load(fake_server, {**body, "model": "nope"}, 50.0, 2))


@pytest.mark.slow
def test_both_servers_are_measured_and_stopped(tiny_base, capsys):
    assert main(["--base", str(tiny_base), "--rate", "20", "--seconds", "2", "--rounds", "2", "--max-tokens", "2"]) == 0
    table = capsys.readouterr().out
    assert "40 requests to each in 2 rounds at 20 a second; 2 tokens a reply" in table
    assert table.count("|\n") == 6


@pytest.mark.parametrize("flags", [["--rate", "0"], ["--rounds", "0"], ["--seconds", "x"], ["--base", "/nowhere"]])
def test_a_bad_flag_is_refused(flags, tiny_base, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--base", str(tiny_base), *flags])
    assert flags[0] in capsys.readouterr().err
