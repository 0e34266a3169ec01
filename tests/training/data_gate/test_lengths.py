"""Properties of lengths: nothing is lost between the bins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data_gate.lengths import measure


@given(st.lists(st.integers(0, 5000), min_size=1))
def test_the_histogram_counts_every_row_in_its_own_span(lengths: list[int]):
    found = measure(lengths)
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    for span, rows in found.histogram.items():
        low, high = map(int, span.split("-"))
        assert rows == sum(low <= length <= high for length in lengths)
    assert sum(found.histogram.values()) == len(lengths)
    assert list(found.percentiles.values()) == sorted(found.percentiles.values())


def test_percentiles_by_hand():
    found = measure(list(range(101)))
    assert found.percentiles == {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99}
    assert found.mean == 50
    assert found.histogram == {
        "0-0": 1, "1-1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32-63": 32, "64-127": 37
    }  # fmt: skip


def test_no_rows_have_no_lengths():
    with pytest.raises(ValueError, match="no rows"):
        measure([])
