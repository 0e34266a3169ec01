"""Imported by the server that training processes are forked from: what each of them would work out anew."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from training.log import StepRecord, TrainLog, plot_loss

get_checkpoint_conversion_mapping("llama")  # compiles 800 patterns, in half a second
with tempfile.TemporaryDirectory() as folder:
    log = TrainLog(None)
    log.add(StepRecord(1, 1.0, 1.0, 1e-4, 1.0, 1, 1, 1.0, 1.0))
    plot_loss(log, Path(folder) / "loss.png", "fonts and layout")
