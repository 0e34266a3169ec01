"""The `data` command: a recipe's data report, without any training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from training.config import cache_dir, load_recipe


def add_parser(parser: argparse.ArgumentParser, recipe_help: str) -> None:
    parser.add_argument("recipe", nargs="?", default="smollm2-starter", help=recipe_help)
    parser.add_argument("--out", type=Path, help="folder of the report (default runs/<run.name>)")
    parser.set_defaults(run=_data)


def _data(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from training.base import resolve_base
    from training.data_gate.report import build_report
    from training.data_gate.write import summary, write_report
    from training.model import load_tokenizer
    from training.prepare import prepare

    config = load_recipe(arguments.recipe, overrides)
    tokenizer = load_tokenizer(resolve_base(config.model, cache_dir(), weights=False).directory)
    build = partial(build_report, tokenizer=tokenizer, config=config)
    report = prepare(tokenizer, config.data, config.run.eval_rows, report=build).report
    assert report is not None  # it was asked for
    path = write_report(arguments.out or Path("runs") / config.run.name, report)
    print(f"{summary(report)}\nwhole report: {path}")
    return 0
