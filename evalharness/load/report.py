"""The load report: load.json, load.md and load.html, all from the same raw samples."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evalharness.load.ecdf import ecdf_svg
from evalharness.load.plan import MIXED, LoadPlan
from evalharness.load.sample import LoadSample, SampleStatus
from evalharness.load.summary import STEADY_P99, Latency, LoadRow

TEMPLATE = "load.html.j2"
DEFINITIONS = (
    "TTFT: from sending to the first content delta. TPOT: (last delta - first) / (tokens - 1), tokens from usage. "
    "E2E: to the end of the stream. Latencies are of answered requests, as p50 / p90 / p99. "
    "Rates: what was answered between the first request's start and the last one's end. "
    "From arrival: counted from when the request was due, so that waiting for a free user is in it. "
    f"* fewer than {STEADY_P99} values: p99 is hardly more than the largest."
)


@dataclass(frozen=True, slots=True)
class LoadReport:
    plan: LoadPlan
    started: datetime
    samples: tuple[LoadSample, ...]
    rows: tuple[LoadRow, ...]
    notes: tuple[str, ...]  # what a reader must know to trust the numbers

    @property
    def error_share(self) -> float | None:
        if not self.samples:
            return None
        return sum(sample.status is not SampleStatus.OK for sample in self.samples) / len(self.samples)


def write_report(report: LoadReport) -> None:
    out = report.plan.out
    (out / "load.json").write_text(json.dumps(as_json(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "load.md").write_text(as_markdown(report), encoding="utf-8")
    (out / "load.html").write_text(as_html(report), encoding="utf-8")


def as_json(report: LoadReport) -> dict[str, Any]:
    plan = dataclasses.asdict(report.plan)
    return {
        "plan": {key: str(value) if isinstance(value, Path) else value for key, value in plan.items()},
        "started": report.started.astimezone(UTC).isoformat(),
        "client": _client(),
        "requests": len(report.samples),
        "error_share": report.error_share,
        "rows": [{**dataclasses.asdict(row), "error_share": row.error_share} for row in report.rows],
        "notes": list(report.notes),
        "definitions": DEFINITIONS,
    }


def as_markdown(report: LoadReport) -> str:
    header, table = tabulate(report)
    lines = [
        "# Load test",
        "",
        _setup(report.plan),
        "",
        *(f"> {note}\n" for note in report.notes),
        "| " + " | ".join(header) + " |",
        "|---|---" + "|--:" * (len(header) - 2) + "|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table),
        "",
        DEFINITIONS,
        "",
        f"{report.started.astimezone(UTC):%Y-%m-%d %H:%M} UTC · client: {_client()}",
        "",
    ]
    return "\n".join(lines)


def as_html(report: LoadReport) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(TEMPLATE)
    header, table = tabulate(report)
    return template.render(
        plan=report.plan,
        setup=_setup(report.plan),
        notes=report.notes,
        header=header,
        table=table,
        charts=_charts(report),
        locust_reports=_locust_reports(report.plan),
        definitions=DEFINITIONS,
        started=f"{report.started.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        client=_client(),
    )


def tabulate(report: LoadReport) -> tuple[list[str], list[list[str]]]:
    """Returns the table's header and rows; the columns from arrival stand only in an open loop's table."""
    columns: dict[str, Callable[[LoadRow], str]] = {
        "scenario": lambda row: report.plan.name(row.scenario),
        "arm": lambda row: report.plan.name(row.arm),
        "requests": lambda row: str(row.requests),
        "errors": _errors,
        "req/s": lambda row: _number(row.requests_per_s),
        "output tok/s": lambda row: _number(row.output_tokens_per_s),
        "TTFT ms": lambda row: _latency(row.ttft_s),
        "TPOT ms": lambda row: _latency(row.tpot_s),
        "E2E ms": lambda row: _latency(row.e2e_s),
    }
    if report.plan.rate is not None:
        columns["TTFT from arrival ms"] = lambda row: _latency(row.ttft_from_arrival_s)
        columns["E2E from arrival ms"] = lambda row: _latency(row.e2e_from_arrival_s)
    return list(columns), [[cell(row) for cell in columns.values()] for row in report.rows]


def _errors(row: LoadRow) -> str:
    if not row.errors:
        return "0"
    return f"{row.requests - row.answered} ({', '.join(f'{kind} {count}' for kind, count in row.errors.items())})"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"


def _latency(value: Latency | None) -> str:
    if value is None:
        return "none"
    star = "*" if value.n < STEADY_P99 else ""
    return " / ".join(f"{seconds * 1000:.0f}" for seconds in (value.p50, value.p90, value.p99)) + star


def _charts(report: LoadReport) -> list[tuple[str, Markup]]:
    measured: dict[str, Callable[[LoadSample], float | None]] = {
        "Time to first token": lambda sample: sample.ttft_s,
        "Time per output token": lambda sample: sample.tpot_s,
        "End to end": lambda sample: sample.e2e_s,
    }
    charts = []
    for title, value in measured.items():
        series: dict[str, list[float]] = {}
        for sample in report.samples:
            seconds = value(sample) if sample.status is SampleStatus.OK else None
            if seconds is not None:
                arm = report.plan.name(sample.arm)
                name = f"{MIXED}: {arm}" if sample.scenario == MIXED else arm
                series.setdefault(name, []).append(seconds)
        if svg := ecdf_svg(series, f"{title.lower()}, seconds; share of requests at most so slow"):
            charts.append((title, Markup(svg)))  # ecdf_svg escapes its names
    return charts


def _locust_reports(plan: LoadPlan) -> list[tuple[str, str]]:
    files = {plan.name(scenario.name): f"{scenario.file_stem}.html" for scenario in plan.scenarios}
    return [(name, quote(file)) for name, file in files.items() if (plan.out / file).is_file()]


def _setup(plan: LoadPlan) -> str:
    arrival = "a closed loop" if plan.rate is None else f"an open loop of {plan.rate:g} arrivals/s (Poisson)"
    return (
        f"{', '.join(plan.arms)} at {plan.url}: {plan.users} streaming users in {arrival}, "
        f"{plan.seconds} s a scenario, at most {plan.max_tokens} tokens a reply, greedy."
    )


def _client() -> str:
    machine = f"{platform.machine()} {platform.system()}"
    return f"Python {platform.python_version()}, locust {version('locust')}, {machine}"
