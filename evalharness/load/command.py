"""The `load` command: each arm alone, then mixed, under streaming users."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evalharness.load.plan import LoadPlan, plan_from
from evalharness.load.preflight import check_server
from evalharness.load.process import LocustFailed, run_scenario
from evalharness.load.progress import Progress
from evalharness.load.report import LoadReport, tabulate, write_report
from evalharness.load.sample import SAMPLES_NAME, read_samples
from evalharness.load.summary import LoadRow, summarise

TOO_MANY_ERRORS, INTERRUPTED = 1, 130
CPU_WARNING = "CPU usage above"  # locust's words in its log


def add_parser(subparsers: Any) -> None:
    """Registers `load`; `args.func(args)` returns 0, 1 for too many errors, or 130 where interrupted."""
    parser = subparsers.add_parser("load", help="load a served model with streaming users", description=__doc__)
    parser.add_argument("--url", required=True, help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("--arm", required=True, action="append", help="a model name; repeat it for each arm")
    parser.add_argument("--mixed", action="store_true", help="then a scenario whose requests pick an arm at random")
    parser.add_argument("--users", type=int, default=8, help="concurrent users; in an open loop the most in flight")
    parser.add_argument("--spawn-rate", type=float, help="users started a second; all in the first without it")
    parser.add_argument("--seconds", type=int, default=20, help="length of each scenario")
    parser.add_argument("--out", type=Path, required=True, help="directory for samples and reports")
    parser.add_argument("--prompts", type=Path, help="file with one prompt a line, or .jsonl with messages")
    parser.add_argument("--max-tokens", type=int, default=64, help="most tokens of a reply")
    parser.add_argument("--arrival", choices=("closed", "open"), default="closed", help="open: requests come at --rate")
    parser.add_argument("--rate", type=float, help="arrivals a second of an open loop")
    parser.add_argument(
        "--max-error-share", type=float, default=0.01, help="exit 1 above this share of failed requests"
    )
    parser.add_argument("--allow-remote", action="store_true", help="load a host other than this machine")
    parser.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds the server's key")
    parser.set_defaults(func=load)


def load(args: argparse.Namespace) -> int:
    """Runs the test and writes its report, after an interrupt too. Raises EvalError where it must not start."""
    plan = plan_from(args)
    check_server(plan)
    started = datetime.now(UTC)
    try:
        completed = _run(plan)
    except LocustFailed as error:
        sys.stderr.write(f"error: {error}\nthe samples until then are in {plan.out / SAMPLES_NAME}\n")
        return TOO_MANY_ERRORS
    samples = read_samples(plan.out / SAMPLES_NAME)
    rows = summarise(samples)
    report = LoadReport(plan, started, tuple(samples), tuple(rows), _notes(plan, rows, completed))
    write_report(report)
    _show(report)
    if not completed:
        return INTERRUPTED
    return _verdict(report)


def _run(plan: LoadPlan) -> bool:
    """Returns False where the user ended it early."""
    plan.out.mkdir(parents=True, exist_ok=True)
    samples = plan.out / SAMPLES_NAME
    if samples.exists():
        _say(f"replacing the samples of an earlier test in {samples}")
        samples.unlink()
    for scenario in plan.scenarios:
        _say(f"{scenario.name}: {plan.users} users, {plan.seconds} s")
        progress = Progress(samples, scenario.name)
        if not run_scenario(plan, scenario, progress.line, _say):
            _say("interrupted: summarising what was measured")
            return False
    return True


def _notes(plan: LoadPlan, rows: Sequence[LoadRow], completed: bool) -> tuple[str, ...]:
    notes = [] if completed else ["Interrupted: the numbers cover the time until then."]
    for row in rows:
        name = f"{plan.name(row.scenario)}/{plan.name(row.arm)}"
        if row.without_usage:
            notes.append(f"{name}: {row.without_usage} replies reported no usage, so there is no tok/s.")
        if row.without_content:
            notes.append(f"{name}: {row.without_content} replies were empty and have no TTFT.")
    for scenario in plan.scenarios:
        log = plan.out / f"{scenario.file_stem}.log"
        if log.is_file() and CPU_WARNING in log.read_text(encoding="utf-8", errors="replace"):
            name = plan.name(scenario.name)
            notes.append(f"{name}: locust itself used a whole core, so latencies may be too high; use fewer users.")
    return tuple(notes)


def _show(report: LoadReport) -> None:
    header, table = tabulate(report)
    widths = [max(len(line[at]) for line in [header, *table]) for at in range(len(header))]
    for line in [header, *table]:
        _say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for note in report.notes:
        _say(f"note: {note}")
    _say(f"report: {report.plan.out / 'load.html'}")


def _verdict(report: LoadReport) -> int:
    share, allowed = report.error_share, report.plan.max_error_share
    if share is None:
        sys.stderr.write("error: no request was sent; raise --seconds or --rate\n")
        return TOO_MANY_ERRORS
    if share > allowed:
        sys.stderr.write(f"error: {share:.1%} of the requests failed; --max-error-share allows {allowed:.1%}\n")
        return TOO_MANY_ERRORS
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
