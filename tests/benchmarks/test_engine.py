"""The engine's benchmark runs every load and prints a line for each number of streams."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.engine import LOADS, measure, parse_arguments, render_table
from serving.engine.engine import WeightFormat


def test_every_load_is_measured_at_every_number_of_streams(tiny_base, tiny_adapters):
    arguments = ["--base", str(tiny_base), "--adapter", str(tiny_adapters["starter"]), "--streams", "1", "3"]
    few = ["--tokens", "4", "--prompt-tokens", "5", "--rounds", "1", "--weights", "plain", "fp16", "nf4"]
    rates = asyncio.run(measure(parse_arguments([*arguments, *few])))
    assert set(rates) == {(streams, each, load) for streams in (1, 3) for each in WeightFormat for load in LOADS}
    assert min(rates.values()) > 0
    lines = [line.split()[:2] for line in render_table(rates).splitlines()]
    assert lines == [
        ["streams", "weights"],
        *([streams, weights] for streams in ("1", "3") for weights in ("plain", "fp16", "nf4")),
    ]


def test_what_is_the_transformers_engines_is_refused_for_another(tiny_base, capsys):
    arguments = ["--base", str(tiny_base), "--adapter", str(tiny_base), "--engine", "vllm"]
    for words in (["--weights", "nf4"], ["--dtype", "float16"]):
        with pytest.raises(SystemExit):
            parse_arguments([*arguments, *words])
        assert "are of --engine transformers" in capsys.readouterr().err
