"""Properties of the written report: both files tell the same, and a row's text carries no markup."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tests.training.data_gate.test_report import GOOD, report
from training.data_gate.write import markdown, summary, write_report


def test_both_files_tell_every_finding(tmp_path: Path):
    found = report(tmp_path, [*GOOD, GOOD[0], {"instruction": "Go on.", "output": "..."}])
    path = write_report(tmp_path / "out", found)
    document = json.loads((tmp_path / "out/data_report.json").read_text())
    assert [f["rows"] for f in document["findings"]] == [f.rows for f in found.findings]
    text = path.read_text()
    for one in found.findings:
        assert f"| {one.name.replace('_', chr(92) + '_')} | {one.rows} | " in text
    assert "- row 11 of row 1\n" in text
    assert f"| total | {found.tokens.total:,} |" in text


def test_the_summary_is_the_size_and_the_warnings(tmp_path: Path):
    good, *warnings = summary(report(tmp_path, GOOD)).splitlines()
    assert good.startswith("10 rows to train on, 0 held out; ")
    assert warnings == []
    lines = summary(replace(report(tmp_path, [*GOOD, GOOD[0]]), rows_dropped=2)).splitlines()
    assert lines[1:] == [
        "2 training rows left out, which repeat a held-out row (data.leakage)",
        "warning: exact duplicates of an earlier row: 1 (9.1%), such as row 11 of row 1",
    ]


def test_a_name_with_markup_is_text(tmp_path: Path):
    found = replace(report(tmp_path, GOOD), dataset="a|b<script>*x*\n# y")
    assert markdown(found).splitlines()[0] == "# Data report: a\\|b\\<script\\>\\*x\\* \\# y"
