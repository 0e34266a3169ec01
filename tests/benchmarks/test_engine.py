"""The engine's benchmark runs every load and prints a line for each number of streams."""

from __future__ import annotations

import asyncio

from benchmarks.engine import LOADS, measure, parse_arguments, render_table


def test_every_load_is_measured_at_every_number_of_streams(tiny_base, tiny_adapters):
    arguments = ["--base", str(tiny_base), "--adapter", str(tiny_adapters["starter"]), "--streams", "1", "3"]
    options = parse_arguments([*arguments, "--tokens", "4", "--prompt-tokens", "5", "--rounds", "1"])
    rates = asyncio.run(measure(options))
    assert set(rates) == {(streams, load) for streams in (1, 3) for load in LOADS}
    assert min(rates.values()) > 0
    lines = render_table(rates).splitlines()
    assert [line.split()[0] for line in lines] == ["streams", "1", "3"]
