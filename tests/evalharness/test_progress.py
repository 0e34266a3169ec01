from __future__ import annotations

import io

from evalharness.progress import Progress


def test_the_line_says_rate_rest_and_failures():
    progress = Progress("held-out", 40, io.StringIO())
    for failed in (False, True, False, False):
        progress.advance(failed=failed)
    assert progress.line(elapsed_s=8.0) == "held-out  4/40  0.50/s  ETA 1:12  1 failed"


def test_a_file_gets_the_first_and_last_line_and_no_control_codes():
    out = io.StringIO()
    progress = Progress("held-out", 3, out)
    for _ in range(3):
        progress.advance(failed=False)
    first, last = out.getvalue().splitlines()
    assert first == "held-out  0/3"
    assert last.startswith("held-out  3/3")
    assert "\r" not in out.getvalue()


def test_a_stage_is_shown_before_its_first_result_and_an_empty_one_never():
    out = io.StringIO()
    Progress("perplexity", 0, out)
    assert out.getvalue() == ""
    Progress("perplexity", 8, out)
    assert out.getvalue() == "perplexity  0/8\n"


def test_a_note_has_its_own_line():
    out = io.StringIO()
    Progress("held-out", 2, out).note("warning: something")
    assert out.getvalue().splitlines()[-1] == "warning: something"


def test_without_an_output_nothing_is_said():
    progress = Progress("metrics", 4, None)
    progress.advance(4)
    assert progress.line(elapsed_s=2.0) == "metrics  4/4  2.00/s  ETA 0:00"
