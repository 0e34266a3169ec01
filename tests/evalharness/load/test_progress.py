"""The progress line of a running scenario."""

from __future__ import annotations

from evalharness.load.progress import Progress
from evalharness.load.sample import LoadSample, SampleStatus


def write(path, scenario, ttft_s, status=SampleStatus.OK):
    sample = LoadSample(scenario=scenario, arm="base", scheduled=None, start=1.0, ttft_s=ttft_s, status=status)
    with path.open("a") as file:
        file.write(sample.model_dump_json() + "\n")


def test_the_line_counts_all_and_times_what_is_new(tmp_path):
    path = tmp_path / "s.jsonl"
    progress = Progress(path, "mixed")
    assert progress.line() is None
    write(path, "base", 9.0)
    assert progress.line() is None
    write(path, "mixed", 0.5)
    assert progress.line() == "  mixed: 1 requests, 0 failed, TTFT p50 now 500 ms"
    write(path, "mixed", 0.1)
    write(path, "mixed", None, SampleStatus.TIMEOUT)
    assert progress.line() == "  mixed: 3 requests, 1 failed, TTFT p50 now 100 ms"
    assert progress.line() == "  mixed: 3 requests, 1 failed"
