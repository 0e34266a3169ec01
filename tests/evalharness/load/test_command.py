"""The `load` command, with real locust processes."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from urllib.parse import quote

import httpx
import pytest

from evalharness.__main__ import main
from evalharness.load.sample import SampleStatus, read_samples

FEW_TOKENS_S = 0.3  # three of the slow server's gaps; a buffering client would be seven late


def load(*flags: object) -> int:
    return main(["load", *map(str, flags)])


def test_locust_measures_the_ttft_that_the_server_sent(slow_server, tmp_path):
    code = load("--url", slow_server.url, "--arm", "base", "--users", 2, "--seconds", 4, "--out", tmp_path)
    assert code == 0
    samples = read_samples(tmp_path / "load_samples.jsonl")
    assert len(samples) >= 4
    starts = [sample.start for sample in samples]
    assert 2.5 < max(starts) - min(starts) < 6, "a scenario is as long as asked for, however slowly locust loads"
    measured = statistics.median(sample.ttft_s for sample in samples)
    sent = statistics.median(slow_server.ttft_s)
    assert 0.9 * sent < measured < sent + FEW_TOKENS_S
    assert len(slow_server.connections) == 1 + 2, "the check's connection, and one for each user"


def test_locusts_users_send_the_key_and_no_file_has_it(slow_server, tmp_path, monkeypatch):
    monkeypatch.setenv("EVAL_TEST_KEY", "k-secret")
    flags = ("--arm", "base", "--users", 2, "--seconds", 1, "--api-key-env", "EVAL_TEST_KEY")
    assert load("--url", slow_server.url, *flags, "--out", tmp_path) == 0
    assert len(slow_server.bodies) >= 1 + 2
    assert set(slow_server.authorizations) == {"Bearer k-secret"}
    assert not [path for path in tmp_path.iterdir() if b"k-secret" in path.read_bytes()]


def test_a_mixed_run_leaves_samples_and_every_report(fake_server, tmp_path, capsys):
    starter = httpx.get(f"{fake_server}/v1/models/starter", trust_env=False).json()["revision"]
    flags = ("--arm", "base", "--arm", starter, "--mixed", "--users", 4, "--seconds", 2, "--max-tokens", 8)
    assert load("--url", fake_server, *flags, "--out", tmp_path) == 0
    samples = read_samples(tmp_path / "load_samples.jsonl")
    assert {(sample.scenario, sample.arm) for sample in samples} == {
        ("base", "base"),
        (starter, starter),
        ("mixed", "base"),
        ("mixed", starter),
    }
    assert all(sample.status is SampleStatus.OK for sample in samples)
    assert all(sample.completion_tokens is not None for sample in samples)
    assert sum(sample.ttft_s is not None for sample in samples) > len(samples) / 2  # its model may answer nothing
    result = json.loads((tmp_path / "load.json").read_text())
    assert [(row["scenario"], row["arm"]) for row in result["rows"]][-1] == ("mixed", "all")
    assert sum(row["requests"] for row in result["rows"] if row["arm"] != "all") == result["requests"] == len(samples)
    page = (tmp_path / "load.html").read_text()
    assert page.count("<svg") == 3
    assert "http-equiv" not in page
    for name in ("base", starter, "mixed"):
        assert "locust" in (tmp_path / f"locust_{name}.html").read_text().lower()
        assert f'href="locust_{quote(name)}.html"' in page
    text = (tmp_path / "load.md").read_text()
    assert "| mixed | all |" in text
    assert "| starter | starter |" in text
    assert text.count(starter) == 1, "said once, above the table"
    assert "mixed: 4 users, 2 s" in capsys.readouterr().out


def test_an_overloaded_open_loop_shows_its_queue_and_fails(slow_server, tmp_path, capsys):
    flags = ("--arm", "base", "--users", 1, "--seconds", 4, "--arrival", "open", "--rate", 5)
    assert load("--url", slow_server.url, *flags, "--out", tmp_path) == 1
    (row,) = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert row["errors"]["not_sent"] >= 4
    assert row["e2e_from_arrival_s"]["p90"] > row["e2e_s"]["p90"] + 1
    assert "E2E from arrival ms" in (tmp_path / "load.md").read_text()
    assert "--max-error-share allows 1.0%" in capsys.readouterr().err


def test_errors_are_counted_and_decide_the_exit_code(slow_server, tmp_path):
    flags = ("--url", slow_server.url, "--arm", "base", "--users", 2, "--seconds", 3, "--out", tmp_path)
    slow_server.busy_after = 3  # the check before the test, and the first request of each user
    assert load(*flags) == 1
    (row,) = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert row["answered"] == 2
    assert row["errors"] == {"http_429": row["requests"] - 2}
    assert row["requests"] > 2


# Tests that a shell runs in the background inherit an ignored SIGINT.
INTERRUPTIBLE = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('evalharness', run_name='__main__', alter_sys=True)"
)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_test_stops_locust_and_still_summarises(slow_server, tmp_path, sent):
    flags = ["load", "--url", slow_server.url, "--arm", "base", "--users", "2", "--seconds", "300", "--out", tmp_path]
    command = [sys.executable, "-c", INTERRUPTIBLE, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    samples = tmp_path / "load_samples.jsonl"
    deadline = time.monotonic() + 60
    while not read_samples(samples) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in output
    result = json.loads((tmp_path / "load.json").read_text())
    assert result["requests"] == len(read_samples(samples)) > 0
    assert "Interrupted" in result["notes"][0]
    size = samples.stat().st_size
    time.sleep(1.5)
    assert samples.stat().st_size == size, "locust goes on"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--url", "http://127.0.0.1:1", "--arm", "base"], "--url http://127.0.0.1:1: no server answers"),
        (["--url", "http://127.0.0.1:1", "--arm", "base", "--users", "5000"], "--users 5000"),
        (["--url", "http://example.org", "--arm", "base"], "--allow-remote"),
    ],
)
def test_what_cannot_start_is_refused_with_exit_code_two(flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evalharness.client.FIRST_WAIT_S", 0.001)
    assert load(*flags, "--out", tmp_path / "out") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
