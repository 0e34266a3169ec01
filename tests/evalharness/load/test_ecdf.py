"""The ECDF chart."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from evalharness.load.ecdf import ecdf_svg


def test_the_chart_is_well_formed_and_names_every_series():
    svg = ecdf_svg({"a <b>": [0.1, 0.2], "c & d": [0.3]}, "seconds")
    text = " ".join(ET.fromstring(svg).itertext())
    assert "a <b>" in text
    assert "c & d" in text


def test_a_step_rises_by_one_request_to_the_whole_share():
    svg = ecdf_svg({"a": [0.1, 0.2, 0.2, 0.5]}, "seconds")
    (path,) = [d for d in re.findall(r'<path d="(M52 [^"]*)"', svg) if d.count("V") == 4]
    heights = [float(y) for y in re.findall(r"V([\d.]+)", path)]
    assert heights == sorted(heights, reverse=True)
    assert heights[-1] == 12.0  # the top
    assert heights[0] == pytest.approx(296 - 284 / 4)


def test_many_values_stay_a_small_drawing():
    svg = ecdf_svg({"a": [index / 1000 for index in range(50_000)]}, "seconds")
    assert len(svg) < 30_000


def test_no_value_is_no_chart():
    assert ecdf_svg({"a": []}, "seconds") is None
