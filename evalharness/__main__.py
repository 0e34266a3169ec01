"""Commands of the evaluation: run, compare, report, gate and load."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evalharness.client import Client, normalise_url
from evalharness.config import api_key
from evalharness.errors import EvalError
from evalharness.load.command import add_parser
from evalharness.records import RunHeader, SamplingSettings
from evalharness.runner import run
from evalharness.samples import load_fixed_prompts, load_samples

if TYPE_CHECKING:  # its metrics take seconds to import, which a run need not wait for
    from evalharness.comparison import Comparison

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
DEFAULT_RESAMPLES = 2000


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.func
    try:
        return command(arguments)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evalharness", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="ask every arm, append the records, then compare and report"))
    for name, function, text in (
        ("compare", _compare, "print the metric table of a run"),
        ("report", _report, "write report.html, report.md and report.json of a run"),
        ("gate", _gate, "exit with 0 where every rule holds, else with 1"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("dir", type=Path, metavar="DIR", help="the directory that `run --out` made")
        _add_scoring(command)
        command.set_defaults(func=function)
        if name == "gate":
            _add_rules(command)
    add_parser(commands)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    sampling = SamplingSettings()
    add("--url", required=True, help="the server's root, for example http://127.0.0.1:8000")
    add("--arm", required=True, action="append", dest="arms", metavar="MODEL", help="repeat; the first is the base")
    add("--held-out", required=True, type=Path, metavar="FILE", help="JSON or JSONL, chats with references or Alpaca")
    add("--out", required=True, type=Path, metavar="DIR", help="where records and reports go; a run continues there")
    add("--limit", type=_positive_int, metavar="N", help="only the first N held-out samples")
    add("--concurrency", type=_positive_int, default=4, help="requests in flight (default %(default)s)")
    add("--max-tokens", type=_positive_int, default=sampling.max_tokens, help="of a reply (default %(default)s)")
    add("--timeout-s", type=_positive_float, default=300.0, help="for one whole reply (default %(default)s)")
    add("--seed", type=int, default=sampling.seed, help="sent with every request, and of the bootstrap")
    add("--api-key-env", metavar="NAME", help="the environment variable that holds the server's key")
    _add_scoring(parser)
    parser.set_defaults(func=_run)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    text = "bootstrap resamples behind each interval (default %(default)s)"
    parser.add_argument("--resamples", type=_positive_int, default=DEFAULT_RESAMPLES, help=text)
    text = "score as LLaMA-Factory does too, in a table apart (lf_bleu_4, lf_rouge_l, ...; needs jieba)"
    parser.add_argument("--lf", action="store_true", help=text)


def _add_rules(parser: argparse.ArgumentParser) -> None:
    text = "such as 'rouge_l.difference.low > 0'; repeat for more"
    parser.add_argument("--rule", action="append", default=[], dest="rules", metavar="RULE", help=text)
    parser.add_argument("--rules", type=Path, dest="rule_file", metavar="FILE", help='TOML with rules = ["...", ...]')
    text = "the share of samples that an arm may lack in a metric that a rule names (default %(default)s: none)"
    parser.add_argument("--allow-failed", type=_share, default=0.0, metavar="SHARE", help=text)


def _run(arguments: argparse.Namespace) -> int:
    arms = tuple(arguments.arms)
    if len(set(arms)) != len(arms):
        raise EvalError(f"--arm {' --arm '.join(arms)}: every arm must have another name")
    held_out, prompts = load_samples(arguments.held_out), load_fixed_prompts()
    samples = held_out.samples[: arguments.limit]
    header = RunHeader(
        url=normalise_url(arguments.url),
        arms=arms,
        sampling=SamplingSettings(max_tokens=arguments.max_tokens, seed=arguments.seed),
        data_sha256=held_out.sha256,
        prompts_sha256=prompts.sha256,
        limit=arguments.limit,
        held_out_samples=len(samples),
    )

    async def ask_all() -> None:
        key = api_key(arguments.api_key_env)
        async with Client(header.url, timeout_s=arguments.timeout_s, api_key=key) as client:
            workers: int = arguments.concurrency
            await run(arguments.out, header, prompts.samples, samples, client, concurrency=workers, out=sys.stderr)

    asyncio.run(ask_all())
    comparison = _write_and_print(arguments.out, arguments)
    scored = [row.estimates[arm].count for row in comparison.metrics if row.name == "rouge_l" for arm in arms]
    return 0 if all(scored) else EXIT_FAILED


def _compare(arguments: argparse.Namespace) -> int:
    _print_comparison(_comparison(arguments.dir, arguments))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    _write_and_print(arguments.dir, arguments)
    return 0


def _gate(arguments: argparse.Namespace) -> int:
    from evalharness.gate import judge, parse_rule, read_rules

    rules = [parse_rule(text) for text in arguments.rules]
    if arguments.rule_file:
        rules += read_rules(arguments.rule_file)
    if not rules:
        raise EvalError("gate: no rule; give --rule 'rouge_l.difference.low > 0' or --rules FILE")
    comparison = _comparison(arguments.dir, arguments)
    found = judge(comparison, rules, arguments.allow_failed)
    for verdict in found:
        value = "unavailable" if verdict.value is None else f"{verdict.value:.4g}"
        implied = "; every gate has this rule" if verdict.implied else ""
        print(f"{'pass' if verdict.passed else 'FAIL'}  {verdict.rule}  (is {value}{implied})")
    if any(verdict.rule.name.endswith(".failed") and not verdict.passed for verdict in found if verdict.implied):
        print("samples lack a score: repeat the run command to ask again, or allow a share with --allow-failed")
    _print_warnings(comparison)
    return 0 if all(verdict.passed for verdict in found) else EXIT_FAILED


def _comparison(directory: Path, arguments: argparse.Namespace) -> Comparison:
    from evalharness.comparison import compare

    return compare(directory, arguments.resamples, sys.stderr, lf=arguments.lf)


def _write_and_print(directory: Path, arguments: argparse.Namespace) -> Comparison:
    from evalharness.report.write import write_report

    comparison = _comparison(directory, arguments)
    paths = write_report(directory, comparison)
    _print_comparison(comparison)
    print("\n" + "\n".join(str(path) for path in paths))
    return comparison


def _print_comparison(comparison: Comparison) -> None:
    from evalharness.report.tables import LF_TITLE, console, lf_tables, metric_tables
    from evalharness.report.verdict import verdicts

    if any(label.revision for label in comparison.labels.values()):
        print(f"arms: {', '.join(comparison.header.arms)}\n")
    print("\n\n".join(console(table) for table in metric_tables(comparison)))
    for table in lf_tables(comparison):
        print(f"\n{LF_TITLE}\n\n{console(table)}")
    for verdict in verdicts(comparison):
        print(f"\n{verdict.headline}" + "".join(f"\n  {line}" for line in verdict.evidence))
    _print_warnings(comparison)


def _print_warnings(comparison: Comparison) -> None:
    for warning in comparison.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is no share; give 0 or more and less than 1, such as 0.05")
    return value


if __name__ == "__main__":
    sys.exit(main())
