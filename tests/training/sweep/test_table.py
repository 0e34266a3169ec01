"""Properties of the table: the lowest NLL is marked, a failure is told, nothing is invented."""

from __future__ import annotations

import json
from pathlib import Path

from training.sweep.outcome import Outcome, Status
from training.sweep.table import best, markdown, write_table


def done(rank: str, nll: float) -> Outcome:
    return Outcome({"lora.rank": rank}, f"rank-{rank}", Status.DONE, None, 3.0, nll, 10, 4096, 812.4, 1.25, 61.0)


FAILED = Outcome({"lora.rank": "16"}, "rank-16", Status.FAILED, "MemoryLimitError: out of\nmemory")
OUTCOMES = [done("4", 2.5), done("8", 2.25), FAILED, Outcome({"lora.rank": "32"}, "rank-32", Status.WAITING)]


def test_the_table_has_a_line_for_each_run():
    lines = markdown("small", OUTCOMES).splitlines()
    assert lines[4:8] == [
        "| `4` | 2.5000 | 4,096 | 812 | 1.25 | 10 | 1:01 |",
        "| `8` | **2.2500** (lowest) | 4,096 | 812 | 1.25 | 10 | 1:01 |",
        "| `16` | failed | – | – | – | – | – |",
        "| `32` | waiting | – | – | – | – | – |",
    ]
    assert "Failed: `rank-16`: MemoryLimitError: out of memory" in lines
    assert "Held-out NLL before training: 3.0 nats a labelled token." in lines


def test_the_json_has_the_same_runs_and_no_number_for_what_has_none(tmp_path: Path):
    write_table(tmp_path, "small", OUTCOMES)
    runs = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert [(run["status"], run["nll_nats"]) for run in runs] == [
        ("done", 2.5), ("done", 2.25), ("failed", None), ("waiting", None),
    ]  # fmt: skip
    assert (tmp_path / "sweep.md").read_text() == markdown("small", OUTCOMES)


def test_without_a_finished_run_there_is_no_best():
    assert best([FAILED]) is None
    assert "lowest" not in markdown("small", [FAILED])
