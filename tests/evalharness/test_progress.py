from __future__ import annotations

import io

from evalharness.progress import Progress


def test_the_line_says_rate_rest_and_failures():
    progress = Progress("held-out", 40, io.StringIO())
    for failed in (False, True, False, False):
        progress.advance(failed=failed)
    assert progress.line(elapsed_s=8.0) == "held-out  4/40  0.50/s  ETA 1:12  1 failed"


def test_a_file_gets_the_last_line_and_no_control_codes():
    out = io.StringIO()
    progress = Progress("held-out", 3, out)
    for _ in range(3):
        progress.advance(failed=False)
    assert out.getvalue().startswith("held-out  3/3")
    assert out.getvalue().count("\n") == 1
    assert "\r" not in out.getvalue()
