from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from evalharness.__main__ import main
from evalharness.comparison import compare
from evalharness.records import RecordKind, SampleStatus, read_run
from tests.evalharness.endpoint import Answer, better_adapter, samples, serve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def held_out(tmp_path) -> Path:
    rows = [{"instruction": f"Say the number {n}", "input": "", "output": f"The number is {n}."} for n in range(4)]
    path = tmp_path / "held_out.json"
    path.write_text(json.dumps(rows))
    return path


def run_words(url: str, held_out: Path, out: Path, *more: str) -> list[str]:
    words = ["run", "--url", url, "--arm", "base", "--arm", "starter", "--held-out", str(held_out), "--out", str(out)]
    return [*words, "--max-tokens", "12", "--resamples", "200", *more]


def test_the_real_app_is_measured_end_to_end(fake_server, held_out, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(run_words(fake_server, held_out, out)) == 0
    shown = capsys.readouterr()
    assert "Perplexity" in shown.out
    assert "ETA" in shown.err
    data = read_run(out)
    assert len(data.records) == 2 * (5 + 4 + 4)
    assert {record.status for record in data.records.values()} == {SampleStatus.OK}
    by_arm = {arm: {r.model for r in data.records.values() if r.arm == arm} for arm in data.header.arms}
    assert all(len(names) == 1 for names in by_arm.values())
    assert by_arm["base"] != by_arm["starter"]
    fingerprints = {(r.arm, r.system_fingerprint) for r in data.records.values()}
    assert len(fingerprints) == 2
    assert {path.name for path in out.iterdir()} >= {"report.html", "report.md", "report.json"}


def test_both_arms_are_scored_on_the_same_tokens_of_the_real_template(fake_server, held_out, tmp_path):
    out = tmp_path / "out"
    main(run_words(fake_server, held_out, out, "--limit", "2"))
    scored = [r for r in read_run(out).records.values() if r.kind is RecordKind.NLL]
    assert len(scored) == 4
    assert len({r.scored_sha256 for r in scored}) == 2
    assert all(r.nll_tokens and r.nll_nats and r.nll_nats > 0 for r in scored)
    row = compare(out, 100).metrics[0]
    total = [r for r in scored if r.arm == "base"]
    expected = math.exp(sum(r.nll_nats or 0 for r in total) / sum(r.nll_tokens or 0 for r in total))
    assert row.estimates["base"].value == pytest.approx(expected)


def test_report_and_compare_need_no_server(finished_run, capsys):
    assert main(["compare", str(finished_run), "--resamples", "100"]) == 0
    assert main(["report", str(finished_run), "--resamples", "100"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("starter is better than base") == 2
    assert "1 http_error" in shown.err


@pytest.mark.parametrize(
    ("rule", "code"),
    [("rouge_l.difference.low > 0", 0), ("perplexity.change_percent <= -99", 1), ("rouge.difference > 0", 2)],
)
def test_the_gates_exit_code_follows_its_rules(finished_run, capsys, rule, code):
    words = ["gate", str(finished_run), "--resamples", "100", "--rule", rule, "--allow-failed", "0.1"]
    assert main(words) == code
    shown = capsys.readouterr()
    assert ("did you mean" in shown.err) == (code == 2)
    assert (f"FAIL  {rule}" in shown.out) == (code == 1)


def test_a_gate_says_that_a_run_with_gaps_does_not_pass(finished_run, capsys):
    assert main(["gate", str(finished_run), "--resamples", "100", "--rule", "rouge_l.difference.low > 0"]) == 1
    shown = capsys.readouterr()
    assert "pass  rouge_l.difference.low > 0" in shown.out
    assert "FAIL  base:rouge_l.failed == 0  (is 1; every gate has this rule)" in shown.out
    assert "--allow-failed" in shown.out
    assert "1 http_error" in shown.err


@pytest.mark.parametrize("share", ["1", "-0.1", "nan", "x"])
def test_a_share_of_failures_that_is_none_is_refused(finished_run, capsys, share):
    with pytest.raises(SystemExit):
        main(["gate", str(finished_run), "--rule", "rouge_l.pairs > 1", "--allow-failed", share])
    assert "--allow-failed" in capsys.readouterr().err


def test_a_pinned_revision_of_the_real_app_is_measured_under_its_name(fake_server, held_out, tmp_path, capsys):
    out = tmp_path / "out"
    revision = httpx.get(f"{fake_server}/v1/models/starter", trust_env=False).json()["revision"]
    words = ["--held-out", str(held_out), "--out", str(out), "--max-tokens", "12", "--resamples", "100"]
    assert main(["run", "--url", fake_server, "--arm", "base", "--arm", revision, *words]) == 0
    assert f"arms: base, {revision}" in capsys.readouterr().out
    assert main(["gate", str(out), "--resamples", "100", "--rule", "starter:rouge_l.count == 4"]) == 0
    assert read_run(out).header.served[revision] == revision
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"starter <small>{revision.partition('@')[2]}</small>" in page
    assert f"{revision} is" not in page


def test_a_gate_without_rules_is_an_error(finished_run, capsys):
    assert main(["gate", str(finished_run)]) == 2
    assert "--rule" in capsys.readouterr().err


def test_no_server_is_exit_2_naming_the_url(held_out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evalharness.client.FIRST_WAIT_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert main(run_words(url, held_out, tmp_path / "out")) == 2
    assert f"--url {url}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_arm_twice_is_an_error(held_out, tmp_path, capsys):
    assert main(run_words("http://127.0.0.1:1", held_out, tmp_path / "out", "--arm", "base")) == 2
    assert "another name" in capsys.readouterr().err


def test_the_key_is_sent_and_never_written(held_out, tmp_path, monkeypatch):
    server, out = better_adapter(), tmp_path / "out"
    monkeypatch.setenv("EVAL_TEST_KEY", "k-secret")
    with serve(server) as url:
        main(run_words(url, held_out, out, "--api-key-env", "EVAL_TEST_KEY"))
    assert set(server.authorizations) == {"Bearer k-secret"}
    assert not [path for path in out.iterdir() if b"k-secret" in path.read_bytes()]


def test_an_unset_key_variable_is_an_error(held_out, tmp_path, capsys):
    assert main(run_words("http://127.0.0.1:1", held_out, tmp_path / "out", "--api-key-env", "EVAL_NO_SUCH_KEY")) == 2
    assert "EVAL_NO_SUCH_KEY" in capsys.readouterr().err


def test_a_run_in_which_an_arm_gave_nothing_exits_1(tmp_path):
    server, held_out = better_adapter(), tmp_path / "held_out.jsonl"
    held_out.write_text("".join(sample.model_dump_json() + "\n" for sample in samples(2)))
    server.failing |= {("starter", sample.prompt_text()) for sample in samples(2)}
    with serve(server) as url:
        assert main(run_words(url, held_out, tmp_path / "out")) == 1


def test_a_lost_server_ends_the_run_with_what_to_do(held_out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evalharness.client.FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("evalharness.runner.LOST_AFTER", 3)
    server = better_adapter()

    def handle(path, body):
        if path == "/v1/chat/completions":
            return Answer({}, headers={"content-length": "1000", "connection": "close"})  # breaks off
        return server(path, body)

    with serve(handle) as url:
        assert main(run_words(url, held_out, tmp_path / "out")) == 2
    assert "continues where it stopped" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["run", "--help"], ["--help"]])
def test_a_run_imports_neither_locust_nor_a_model_library(words):
    code = (
        "import sys\nfrom evalharness.__main__ import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'locust', 'gevent', 'torch', 'evaluate', 'training', 'serving'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_llama_factorys_scores_are_shown_apart_on_request_and_can_be_gated(finished_run: Path, capsys):
    assert main(["compare", str(finished_run), "--resamples", "100"]) == 0
    assert "LLaMA-Factory" not in capsys.readouterr().out
    assert main(["compare", str(finished_run), "--resamples", "100", "--lf"]) == 0
    own, _, theirs = capsys.readouterr().out.partition("As LLaMA-Factory computes it; not comparable with the rest")
    assert "ROUGE-L " in own
    assert "ROUGE-L (LF)" in theirs
    rule = ["--resamples", "100", "--allow-failed", "0.1", "--rule", "lf_bleu_4.difference > 0"]
    assert main(["gate", str(finished_run), "--lf", *rule]) == 0
    assert main(["gate", str(finished_run), *rule]) == 2
    assert "lf_bleu_4" in capsys.readouterr().err
