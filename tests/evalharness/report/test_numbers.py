from __future__ import annotations

from evalharness.report.numbers import difference_text, estimate_text, plain, signed
from evalharness.statistics import NO_DIFFERENCE, Difference, Estimate, Interval


def test_what_is_not_there_is_a_dash_never_a_number():
    assert {plain(None), signed(None), estimate_text(Estimate(None, None, 0)), difference_text(NO_DIFFERENCE)} == {"–"}


def test_a_difference_has_sign_interval_and_percent():
    found = Difference(-6.372, Interval(-7, -5.81), -34.04, Interval(-36, -32), 100)
    assert difference_text(found) == "−6.37 [−7.00, −5.81] (−34.0 %)"
    assert signed(2.5) == "+2.50"
