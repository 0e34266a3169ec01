"""Writes report.html, report.md and report.json of a comparison."""

from __future__ import annotations

import base64
import enum
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evalharness.comparison import Comparison
from evalharness.records import RecordKind
from evalharness.report.forest import CENTRE, PLOT_LEFT, PLOT_WIDTH, forest
from evalharness.report.numbers import difference_text, estimate_text, plain, signed
from evalharness.report.tables import LF_TITLE, Table, count_table, lf_tables, markdown, metric_tables
from evalharness.report.verdict import direction, verdicts
from evalharness.report.view import SampleView, failures, sample_views

HERE = Path(__file__).parent
HTML_NAME, MARKDOWN_NAME, JSON_NAME = "report.html", "report.md", "report.json"


def write_report(directory: Path, comparison: Comparison) -> list[Path]:
    """Returns the paths it wrote."""
    texts = {HTML_NAME: html(comparison), MARKDOWN_NAME: markdown_report(comparison), JSON_NAME: document(comparison)}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


def html(comparison: Comparison) -> str:
    """Returns one self-contained page; texts are escaped, and its policy runs no script but its own."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(plain=plain, signed=signed, estimate=estimate_text, difference=difference_text)
    script = (HERE / "report.js.j2").read_text(encoding="utf-8").strip()
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        verdicts=verdicts(comparison),
        direction=direction,
        forests=[forest(comparison, arm) for arm in comparison.others],
        plot={"left": PLOT_LEFT, "width": PLOT_WIDTH, "centre": CENTRE},
        counts=count_table(comparison),
        prompts=sample_views(comparison, RecordKind.FIXED),
        samples=sample_views(comparison, RecordKind.HELD_OUT),
        failures=failures(comparison),
        settings=_settings(comparison),
        lf_title=LF_TITLE,
        script=Markup(script),  # our own file, not a reply
        script_hash=script_hash,
    )


def markdown_report(comparison: Comparison) -> str:
    lines = ["# Evaluation", ""]
    for verdict in verdicts(comparison):
        lines += [f"**{_line(verdict.headline)}.** {_line('; '.join(verdict.evidence))}", ""]
    lines += _tables(metric_tables(comparison))
    if comparison.lf_metrics:
        lines += [f"## {LF_TITLE}", "", *_tables(lf_tables(comparison))]
    lines += ["## Requests", "", markdown(count_table(comparison)), ""]
    lines += [f"- {_line(warning)}" for warning in comparison.warnings]
    lines += ["", "## Fixed prompts", ""]
    for view in sample_views(comparison, RecordKind.FIXED):
        lines += _fixed_prompt(comparison, view)
    lines += ["## Provenance", "", markdown([("Setting", "Value"), *_settings(comparison)]), ""]
    signatures = [(row.label, row.signature) for row in comparison.metrics]
    lines += [markdown([("Metric", "Signature"), *signatures]), ""]
    return "\n".join(lines)


def _tables(tables: Iterable[Table]) -> Iterator[str]:
    for table in tables:
        yield from (markdown(table), "")


def document(comparison: Comparison) -> str:
    """Returns all numbers as JSON; texts stay in the records."""
    content = {
        "format_version": 1,
        "run": comparison.header.model_dump(mode="json"),
        "bootstrap": asdict(comparison.bootstrap),
        "verdicts": [asdict(verdict) for verdict in verdicts(comparison)],
        "metrics": [asdict(row) for row in comparison.metrics],
        "arms": [asdict(arm) for arm in comparison.arms],
        "warnings": comparison.warnings,
        "failures": [asdict(failure) for failure in failures(comparison)],
        "samples": comparison.scores,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=_enum_value) + "\n"


def _settings(comparison: Comparison) -> list[tuple[str, str]]:
    header = comparison.header
    sampling = ", ".join(f"{name} {value}" for name, value in header.sampling.model_dump().items())
    limit = "all" if header.limit is None else f"the first {header.limit}"
    answered = [(f"answered as {arm.arm}", "; ".join(arm.answered_by) or "nothing") for arm in comparison.arms]
    served = [(f"revision of {arm}", header.served.get(arm) or "not told by the server") for arm in header.arms]
    return [
        ("server, where the run began", header.url),
        *served,
        *answered,
        ("held-out samples", f"{header.held_out_samples} ({limit} of the file)"),
        ("held-out data sha256", header.data_sha256),
        ("fixed prompts sha256", header.prompts_sha256),
        ("sampling", sampling),
        (
            "bootstrap",
            f"{comparison.bootstrap.resamples} resamples, seed {comparison.bootstrap.seed}, percentiles 2.5-97.5",
        ),
    ]


def _fixed_prompt(comparison: Comparison, view: SampleView) -> Iterator[str]:
    yield from (f"### {_line(view.prompt)}", "")
    for cell in view.cells:
        text = cell.completion if cell.completion is not None else f"({cell.status}: {cell.error})"
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
        yield from (f"{_line(comparison.name(cell.arm))}:", "", fence, text, fence, "")


def _line(text: str) -> str:
    """Returns text as one line that carries no markup of its own."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _enum_value(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON form")
