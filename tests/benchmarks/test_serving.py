"""The serving benchmark against the real app."""

from __future__ import annotations

import json

import pytest

from benchmarks.serving import Measurement, fold, main
from evalharness.load.sample import LoadSample, SampleStatus


def measurement(rate: float, *ttfts: float) -> Measurement:
    known = {"scenario": "b", "arm": "a", "scheduled": None, "start": 1.0, "status": SampleStatus.OK}
    samples = tuple(LoadSample(**known, ttft_s=ttft, tpot_s=0.01, completion_tokens=8) for ttft in ttfts)
    return Measurement(rate, samples)


def test_the_ratio_is_of_rounds_that_ran_together():
    base = [measurement(100, 0.1), measurement(50, 0.2), measurement(10, 0.3)]  # the machine slows down
    arm = [measurement(80, 0.1), measurement(40, 0.2), measurement(8, 0.3)]
    result = fold(4, "starter", arm, base)
    assert result.output_tokens_per_s == 40
    assert result.ratio_to_first_arm == pytest.approx(0.8)
    assert result.ttft_s == 0.2
    assert result.tokens_per_reply == 8


def test_every_arm_and_mixed_is_measured_at_every_number_of_streams(fake_server, capsys):
    flags = ["--arm", "base", "--arm", "starter", "--streams", "1", "3", "--rounds", "2", "--max-tokens", "6"]
    assert main(["--url", fake_server, *flags]) == 0
    table, _, text = capsys.readouterr().out.partition("\n\n{")
    result = json.loads("{" + text)
    rows = [(row["streams"], row["arm"]) for row in result["results"]]
    assert rows == [(streams, arm) for streams in (1, 3) for arm in ("base", "starter", "mixed")]
    for row in result["results"]:
        assert row["output_tokens_per_s"] > 0
        assert len(row["rounds_tokens_per_s"]) == 2
        assert row["ttft_s"] > 0
        assert 1 <= row["tokens_per_reply"] <= 6
    assert [row["ratio_to_first_arm"] for row in result["results"] if row["arm"] == "base"] == [1.0, 1.0]
    assert result["machine"]["cpu"] in table
    assert table.count("| mixed |") == 2


def test_the_json_goes_to_a_file_where_asked(fake_server, tmp_path, capsys):
    path = tmp_path / "serving.json"
    flags = ["--arm", "base", "--streams", "1", "--rounds", "1", "--max-tokens", "4", "--json", str(path)]
    assert main(["--url", fake_server, *flags]) == 0
    assert [row["arm"] for row in json.loads(path.read_text())["results"]] == ["base"]
    assert "{" not in capsys.readouterr().out


def test_a_failing_request_ends_the_benchmark(fake_server, capsys):
    assert main(["--url", fake_server, "--arm", "wrong", "--streams", "1"]) == 1
    assert "wrong: HTTP 404" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--streams", "0"], ["--arm", "base"], ["--rounds", "x"]])
def test_a_bad_flag_is_refused(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--url", "http://127.0.0.1:1", "--arm", "base", *flags])
    assert flags[0] in capsys.readouterr().err
