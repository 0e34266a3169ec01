"""The bad batch: the rows of a step whose loss or gradient is not finite, saved for inspection."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.batch import pack_rows
from training.errors import TrainingError
from training.run import Run

BAD_BATCH = "bad_batch.json"


class NonFiniteError(TrainingError):
    """A loss or a gradient norm that is NaN or infinite; says where its rows were saved."""


def require_finite(run: Run, step: int, rows: Sequence[int], nll_nats: float, grad_norm: float) -> None:
    """Raises NonFiniteError for step `step` (1-based) after saving its rows, given as indices into the training rows.

    An infinite gradient of a finite loss passes under fp16's loss scaler, which skips that update and halves its
    scale; not once the scale is below 1, where scaling is no longer the cause.
    """
    scaler = run.accelerator.scaler
    overflow = scaler is not None and scaler.get_scale() >= 1
    if math.isfinite(nll_nats) and (math.isfinite(grad_norm) or overflow):
        return
    what = f"gradient norm is {grad_norm}" if math.isfinite(nll_nats) else f"loss is {nll_nats}"
    path = run.out / BAD_BATCH
    losses = {row: _nll_alone(run, row) for row in rows}  # in every process: a sharded model needs them all
    if run.accelerator.is_main_process:
        _save(run, path, step, losses, {"nll_nats": str(nll_nats), "grad_norm": str(grad_norm)})
    raise NonFiniteError(
        f"step {step}: the {what}; its rows are in {path}, and the checkpoints before it stay. Mend or leave out those "
        f"rows, or lower optim.learning_rate = {run.config.optim.learning_rate}, and start with --fresh"
    )


def _save(run: Run, path: Path, step: int, losses: dict[int, float], values: dict[str, str]) -> None:
    """Writes the rows whose own loss is not finite; all of the step's where each alone is finite."""
    bad = [row for row, nll_nats in losses.items() if not math.isfinite(nll_nats)]
    found = {
        "step": step,
        **values,
        "rows_of_the_step": [run.data.train_numbers[row] for row in losses],
        "rows": [_describe(run, row, losses[row]) for row in bad or losses],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(run: Run, row: int, nll_nats: float) -> dict[str, Any]:
    example = run.data.train[row]
    return {
        "row": run.data.train_numbers[row],
        "nll_nats": nll_nats if math.isfinite(nll_nats) else str(nll_nats),  # JSON has no NaN
        "text": run.tokenizer.decode(list(example.input_ids)),
        "input_ids": list(example.input_ids),
        "labels": list(example.labels),
    }


@torch.no_grad()
def _nll_alone(run: Run, row: int) -> float:
    """Returns the row's summed NLL."""
    (pack,) = pack_rows([run.data.train[row]], budget=1)
    with run.accelerator.autocast():
        return float(run.network(pack.to(run.accelerator.device)))
