from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from evalharness.errors import RecordError, ServerError
from evalharness.records import RECORDS_NAME, RecordKind, RecordWriter, SampleStatus, read_records, read_run
from evalharness.runner import interleave
from tests.evalharness.endpoint import Answer, better_adapter, run_once, samples, serve

ROOT = Path(__file__).resolve().parents[2]


def test_arms_take_turns_in_going_first():
    tasks = list(interleave(RecordKind.HELD_OUT, samples(3), ("a", "b")))
    assert [(task.sample.id, task.arm) for task in tasks] == [
        ("s0", "a"),
        ("s0", "b"),
        ("s1", "b"),
        ("s1", "a"),
        ("s2", "a"),
        ("s2", "b"),
    ]


def test_every_arm_is_asked_everything_once_and_a_second_run_asks_nothing(tmp_path):
    server = better_adapter()
    with serve(server) as url:
        run_once(tmp_path, url, samples(4))
        first = list(server.asked)
        run_once(tmp_path, url, samples(4))
    chats = Counter(entry for entry in first if entry[0] == "chat")
    assert len(chats) == 2 * (5 + 4)
    assert set(chats.values()) == {1}
    assert server.asked == first
    records = read_records(tmp_path / RECORDS_NAME)
    assert Counter(key.kind for key in records) == {RecordKind.FIXED: 10, RecordKind.HELD_OUT: 8, RecordKind.NLL: 8}


def test_failures_are_rows_and_are_asked_again(tmp_path):
    server = better_adapter()
    server.failing.add(("base", "Question number 1?"))
    with serve(server) as url:
        shown = run_once(tmp_path, url, samples(3))
        failed = [r for r in read_run(tmp_path).records.values() if r.status is not SampleStatus.OK]
        server.failing.clear()
        server.asked.clear()
        run_once(tmp_path, url, samples(3))
    assert "1 failed" in shown
    assert [(r.sample_id, r.arm, r.status) for r in failed] == [("s1", "base", SampleStatus.HTTP_ERROR)]
    assert server.asked == [("chat", "base", "Question number 1?")]
    assert all(r.status is SampleStatus.OK for r in read_run(tmp_path).records.values())


def test_a_killed_run_continues_without_repeating_what_it_has(tmp_path):
    server, held_out, out = better_adapter(), tmp_path / "held_out.jsonl", tmp_path / "run"
    held_out.write_text("".join(sample.model_dump_json() + "\n" for sample in samples(20)))

    def slow(path, body):
        time.sleep(0.03)
        return server(path, body)

    with serve(slow) as url:
        words = ["run", "--url", url, "--arm", "base", "--arm", "starter", "--held-out", held_out, "--out", out]
        process = subprocess.Popen([sys.executable, "-m", "evalharness", *map(str, words)], cwd=ROOT)
        while len(server.asked) < 20:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with (out / RECORDS_NAME).open("ab") as file:
            file.write(b'{"kind": "held_out", "sample_id": "s')
        kept = {key for key in read_records(out / RECORDS_NAME) if key.kind is not RecordKind.NLL}
        time.sleep(0.2)
        server.asked.clear()
        run_once(out, url, samples(20))
    assert 10 <= len(kept) < 50
    assert sum(kind == "chat" for kind, *_ in server.asked) == 2 * (5 + 20) - len(kept)
    lines = (out / RECORDS_NAME).read_bytes().splitlines()
    assert len(lines) == len({json.dumps([r["kind"], r["sample_id"], r["arm"]]) for r in map(json.loads, lines)}) == 90


def test_a_directory_of_other_inputs_is_refused(tmp_path):
    with serve(better_adapter()) as url:
        run_once(tmp_path, url, samples(2))
        with pytest.raises(RecordError, match="data_sha256"):
            run_once(tmp_path, url, samples(3))


def test_records_of_a_former_revision_do_not_pass_as_the_new_ones(tmp_path):
    server = better_adapter()
    server.models["starter"] = {"revision": "starter@0123456789ab"}
    with serve(server) as url:
        run_once(tmp_path, url, samples(2))
        assert read_run(tmp_path).header.served == {"base": None, "starter": "starter@0123456789ab"}
        server.models["starter"] = {"revision": "starter@ba9876543210"}
        with pytest.raises(RecordError, match=r"starter@0123456789ab, is now starter@ba9876543210.*--out"):
            run_once(tmp_path, url, samples(2))


def test_a_run_continues_at_another_address(tmp_path):
    server = better_adapter()
    server.failing.add(("base", "Question number 1?"))
    with serve(server) as url:
        run_once(tmp_path, url, samples(2))
    server.failing.clear()
    server.asked.clear()
    with serve(server) as url:
        run_once(tmp_path, url, samples(2))
    assert server.asked == [("chat", "base", "Question number 1?")]


def test_a_revision_that_changes_in_mid_run_is_said(tmp_path):
    server = better_adapter()

    def swapped(path, body):
        if len(server.asked) >= 12:
            server.revision = "2"
        return server(path, body)

    with serve(swapped) as url:
        shown = run_once(tmp_path, url, samples(4))
    assert shown.count("warning: starter: answered by starter@2 (fp-starter) from here on") == 1
    assert shown.count("by starter@1 (fp-starter) until now") == 1


def test_a_record_that_cannot_be_kept_ends_the_run_with_its_reason(tmp_path, monkeypatch):
    def full(self, record):
        raise RecordError("no space")

    monkeypatch.setattr(RecordWriter, "append", full)
    with serve(better_adapter()) as url, pytest.raises(RecordError, match="no space"):
        run_once(tmp_path, url, samples(2))


def test_the_perplexity_stage_shows_its_progress_from_its_probe_on(tmp_path):
    with serve(better_adapter()) as url:
        shown = run_once(tmp_path, url, samples(3)).splitlines()
    assert [line.split("  ")[:2] for line in shown if line.startswith("perplexity")] == [
        ["perplexity: how a turn ends", "0/2"],
        ["perplexity: how a turn ends", "2/2"],
        ["perplexity", "0/6"],
        ["perplexity", "6/6"],
    ]
    assert "/s  ETA 0:00" in shown[-1]


def test_an_unknown_arm_is_named_with_those_that_exist(tmp_path):
    with serve(better_adapter()) as url, pytest.raises(ServerError, match=r"'starterr'.*base, starter"):
        run_once(tmp_path / "run", url, samples(2), ("base", "starterr"))
    assert not (tmp_path / "run").exists()


def test_a_server_that_lists_no_models_is_fine(tmp_path):
    server = better_adapter()

    def handle(path, body):
        return Answer({}, 404) if path.startswith("/v1/models") else server(path, body)

    with serve(handle) as url:
        run_once(tmp_path, url, samples(2))
    assert all(record.status is SampleStatus.OK for record in read_run(tmp_path).records.values())


def test_without_perplexity_the_chats_are_kept(tmp_path):
    server = better_adapter()
    server.chat_only = True
    with serve(server) as url:
        run_once(tmp_path, url, samples(2))
    statuses = Counter((key.kind, record.status) for key, record in read_run(tmp_path).records.items())
    assert statuses[RecordKind.NLL, SampleStatus.UNAVAILABLE] == 4
    assert statuses[RecordKind.HELD_OUT, SampleStatus.OK] == 4
