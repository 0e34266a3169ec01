"""The `sweep` command: a recipe trained at every combination of the values that fields are given."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from training.config import cache_dir, load_recipe

EPILOG = """\
give any field of the recipe several values, separated by commas; a list in brackets is one value:
  python -m training sweep RECIPE --lora.rank 4,8,16 --optim.learning_rate 5e-5,2e-4 \\
      --lora.target_modules '["q_proj","v_proj"],all-linear'
the same command again skips what is finished, resumes what was cut off and tries again what failed"""


def add_parser(parser: argparse.ArgumentParser, recipe_help: str) -> None:
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", nargs="?", default="smollm2-starter", help=recipe_help)
    parser.add_argument("--out", type=Path, help="folder of the runs and the table (default runs/<run.name>-sweep)")
    parser.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from training.sweep.grid import parse_axes, points

    axes, single = parse_axes(overrides)
    found = points(arguments.recipe, axes, single)
    name = load_recipe(arguments.recipe, single).run.name
    from training.stop import EXIT_STOPPED, TrainingStopped
    from training.sweep.outcome import Status
    from training.sweep.runs import run_sweep
    from training.sweep.table import MARKDOWN_NAME, markdown

    out = arguments.out or Path("runs") / f"{name}-sweep"
    try:
        outcomes = run_sweep(name, axes, found, out, cache_dir())
    except TrainingStopped as stop:
        print(f"{stop}; the same sweep again goes on from there")
        return EXIT_STOPPED
    print(f"{markdown(name, outcomes)}\n{out / MARKDOWN_NAME}")
    return 0 if all(outcome.status is Status.DONE for outcome in outcomes) else 1
