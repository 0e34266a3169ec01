"""The sample file."""

from __future__ import annotations

import pytest

from evalharness.load.sample import LoadSample, SampleStatus, read_samples

SAMPLE = LoadSample(scenario="base", arm="base", scheduled=1.0, start=1.5, status=SampleStatus.OK)


def test_samples_survive_the_file(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(f"{SAMPLE.model_dump_json()}\n" * 2)
    assert read_samples(path) == [SAMPLE, SAMPLE]


def test_a_line_being_written_waits_for_its_end(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(SAMPLE.model_dump_json() + '\n{"scenario": "ba')
    assert read_samples(path) == [SAMPLE]
    assert read_samples(tmp_path / "none.jsonl") == []


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(SAMPLE.model_dump_json() + "\n{}\n")
    with pytest.raises(ValueError, match=r"s\.jsonl:2: not a load sample"):
        read_samples(path)


def test_http_errors_are_told_apart_by_their_status():
    error = SAMPLE.model_copy(update={"status": SampleStatus.HTTP_ERROR, "http_status": 503})
    assert (error.kind, SAMPLE.kind, SAMPLE.queued_s) == ("http_503", "ok", 0.5)
