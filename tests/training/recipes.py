"""Small recipes on the tiny model, for tests that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.config import TrainConfig

WORDS = "walk swim sleep hut lake stars qubit zero one two fox dog quick lazy simple terms".split()  # noqa: SIM905


def write_rows(path: Path, count: int = 24) -> Path:
    rows = [
        {
            "instruction": f"Explain {WORDS[number % 16]} and {WORDS[(number * 7 + 3) % 16]} in {number} words.",
            "input": "",
            "output": f"The {WORDS[(number * 5) % 16]} is {' '.join(WORDS[: 2 + number % 9])}.",
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_config(base: Path, folder: Path, **sections: dict[str, Any]) -> TrainConfig:
    """Returns a recipe of seconds: 20 rows to train on, 4 held out, steps of 8 rows."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    config: dict[str, dict[str, Any]] = {
        "model": {"id": str(base), "quantisation": "none", "dtype": "float32"},
        "data": {"dataset": str(rows), "held_out": 4, "cutoff": 64, "leakage": "report"},
        "lora": {"rank": 4, "alpha": 8.0},
        "optim": {"learning_rate": 5e-3, "epochs": 2, "batch_size": 8, "micro_batch_tokens": 256},
        "run": {"name": "small", "log_every": 1, "save_every": 2, "eval_every": 3, "eval_rows": 4},
    }
    for name, changes in sections.items():
        config[name] |= changes
    return TrainConfig.model_validate(config)
