"""The lock: a second process is told who trains there, and a killed one holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training.lock import BusyError, run_lock

ROOT = Path(__file__).resolve().parent.parent.parent
HOLD = "import sys, time; from pathlib import Path; from training.lock import run_lock\n"
HOLD += "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"


def test_one_process_holds_a_run_until_it_ends_however_it_ends(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(BusyError, match=rf"run: process {holder.pid} trains there.*--out"),
            run_lock(tmp_path / "run"),
        ):
            pass
        with run_lock(tmp_path / "other"):
            assert (tmp_path / "other" / ".lock").read_text() == f"{os.getpid()}\n"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with run_lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"
