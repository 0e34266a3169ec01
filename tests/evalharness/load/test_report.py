"""The load report in its three forms."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from evalharness.load.plan import LoadPlan
from evalharness.load.report import LoadReport, as_html, as_json, as_markdown, tabulate, write_report
from evalharness.load.sample import LoadSample, SampleStatus
from evalharness.load.summary import summarise


def report(out: Path, samples: list[LoadSample], rate: float | None = None, notes: tuple[str, ...] = ()) -> LoadReport:
    plan = LoadPlan(
        url="http://127.0.0.1:8000",
        arms=("a|<b>",),
        mixed=False,
        users=3,
        spawn_rate=3,
        seconds=20,
        out=out,
        prompts=None,
        max_tokens=64,
        rate=rate,
        max_error_share=0.01,
        api_key_env=None,
    )
    return LoadReport(plan, datetime(2026, 11, 24, tzinfo=UTC), tuple(samples), tuple(summarise(samples)), notes)


def answered(**fields: object) -> LoadSample:
    known = {"scenario": "a|<b>", "arm": "a|<b>", "scheduled": 99.5, "start": 100.0, "status": SampleStatus.OK}
    return LoadSample(**{**known, "ttft_s": 0.1234, "tpot_s": 0.01, "e2e_s": 2.0, "completion_tokens": 50, **fields})


BUSY = answered(status=SampleStatus.HTTP_ERROR, http_status=429, ttft_s=None, tpot_s=None, completion_tokens=None)


def test_the_three_forms_carry_the_same_numbers(tmp_path):
    write_report(report(tmp_path, [answered(), BUSY]))
    (row,) = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert (row["output_tokens_per_s"], row["ttft_s"]["p50"], row["error_share"]) == (25.0, 0.1234, 0.5)
    for name in ("load.md", "load.html"):
        text = (tmp_path / name).read_text()
        assert "123 / 123 / 123*" in text
        assert "25.0" in text
        assert "1 (http_429 1)" in text


def test_names_are_escaped_where_they_are_shown(tmp_path):
    shown = report(tmp_path, [answered()])
    assert "a\\|<b>" in as_markdown(shown)
    page = as_html(shown)
    assert "<b>" not in page
    assert page.count("a|&lt;b&gt;") >= 4  # twice in the table, once in each chart


def test_the_page_needs_nothing_else(tmp_path):
    page = as_html(report(tmp_path, [answered()]))
    assert "src=" not in page
    assert "<link" not in page
    assert page.count("<svg") == 3


def test_only_an_open_loop_has_columns_from_arrival(tmp_path):
    closed, _ = tabulate(report(tmp_path, [answered()]))
    opened, (cells,) = tabulate(report(tmp_path, [answered()], rate=2.0))
    assert [name for name in opened if name not in closed] == ["TTFT from arrival ms", "E2E from arrival ms"]
    assert cells[-1] == "2500 / 2500 / 2500*"


def test_without_an_answer_there_is_none_and_no_chart(tmp_path):
    empty = report(tmp_path, [BUSY])
    _, (cells,) = tabulate(empty)
    assert cells[-3:] == ["none", "none", "none"]
    assert "<svg" not in as_html(empty)


def test_notes_stand_in_every_form(tmp_path):
    noted = report(tmp_path, [answered()], notes=("Interrupted: & cut",))
    assert "> Interrupted: & cut" in as_markdown(noted)
    assert "Interrupted: &amp; cut" in as_html(noted)
    assert as_json(noted)["notes"] == ["Interrupted: & cut"]


def test_the_error_share_is_over_all_samples(tmp_path):
    assert report(tmp_path, [answered(), answered(), BUSY]).error_share == pytest.approx(1 / 3)
    assert report(tmp_path, []).error_share is None
