"""The data report on disk, as JSON and Markdown, and in a few lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from training.data_gate.lengths import Lengths
from training.data_gate.report import DataReport

JSON_NAME, MARKDOWN_NAME = "data_report.json", "data_report.md"
_BAR = 40  # characters of the longest bar


def write_report(folder: Path, report: DataReport) -> Path:
    """Writes both files into `folder` and returns the path of the readable one."""
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
    (folder / JSON_NAME).write_text(document, encoding="utf-8")
    (folder / MARKDOWN_NAME).write_text(markdown(report), encoding="utf-8")
    return folder / MARKDOWN_NAME


def summary(report: DataReport) -> str:
    """Returns what a run's start tells: the size, and one line for each finding that is a warning."""
    tokens, total = report.tokens, sum(report.reply_scripts.values())
    scripts = ", ".join(f"{name} {count / total:.0%}" for name, count in report.reply_scripts.items())
    lines = [
        f"{report.rows_train:,} rows to train on, {report.rows_held_out:,} held out; {tokens.total:,} tokens an epoch, "
        f"{tokens.labelled:,} of them trained, in {tokens.packs:,} packs (padded batches: {tokens.padded:,}); "
        f"replies: {scripts}"
    ]
    if report.rows_dropped:
        lines.append(f"{report.rows_dropped:,} training rows left out, which repeat a held-out row (data.leakage)")
    for finding in report.findings:
        if finding.warning:
            first = f", such as {finding.examples[0]}" if finding.examples else ""
            lines.append(f"warning: {finding.name}: {finding.rows:,} ({finding.share:.1%}){first}")
    return "\n".join(lines)


def markdown(report: DataReport) -> str:
    rows = [(_cell(f.name), f"{f.rows:,}", f"{f.share:.2%}", "**look**" if f.warning else "") for f in report.findings]
    names = ("read", "trained on", "held out", "left out as leaks")
    counts = (report.rows_read, report.rows_train, report.rows_held_out, report.rows_dropped)
    lines = [
        f"# Data report: {_cell(report.dataset)}",
        "",
        *_table(("Rows", ""), zip(names, map(_number, counts), strict=True)),
    ]
    lines += ["", "## Findings", "", *_table(("Finding", "Rows", "Share", ""), rows)]
    for finding in report.findings:
        if finding.examples:
            lines += ["", f"### {_cell(finding.name)}", "", *(f"- {_cell(text)}" for text in finding.examples)]
    lines += ["", "## Scripts", ""]
    found = dict.fromkeys([*report.prompt_scripts, *report.reply_scripts])
    scripts = [(name, report.prompt_scripts.get(name, 0), report.reply_scripts.get(name, 0)) for name in found]
    lines += _table(
        ("Script of most letters", "Prompts", "Replies"), ((n, _number(p), _number(r)) for n, p, r in scripts)
    )
    lines += ["", "## Tokens of one epoch", ""]
    lines += _table(("Tokens", ""), ((n.replace("_", " "), _number(v)) for n, v in asdict(report.tokens).items()))
    for name, lengths in (("Prompt", report.prompt_tokens), ("Reply", report.reply_tokens)):
        lines += ["", f"## {name} lengths in tokens", "", *_lengths(lengths)]
    return "\n".join([*lines, ""])


def _lengths(lengths: Lengths) -> Iterator[str]:
    names = ("shortest", *lengths.percentiles, "longest", "mean")
    values = (lengths.shortest, *lengths.percentiles.values(), lengths.longest, lengths.mean)
    yield from _table(names, [tuple(map(_number, values))])
    yield from ("", "```")
    most = max(lengths.histogram.values())
    for span, rows in lengths.histogram.items():
        yield f"{span:>13}  {rows:>8,}  {'#' * -(-_BAR * rows // most)}"
    yield "```"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    return [f"| {line} |" for line in [*lines, *(" | ".join(row) for row in rows)]]


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _cell(text: str) -> str:
    """Returns text as one line that carries no markup of its own."""
    return " ".join(text.split()).replace("\\", "\\\\").translate({ord(sign): f"\\{sign}" for sign in "`*_[]<>#|"})
