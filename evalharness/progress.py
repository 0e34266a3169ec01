"""Progress: one line that says how far a stage is, how fast, and when it ends."""

from __future__ import annotations

import time
from typing import TextIO

LINE_EVERY_S = 10.0  # where the output is a file, not a terminal
REDRAW_EVERY_S = 0.2


class Progress:
    """Says at once that the stage began; `out` None says nothing."""

    def __init__(self, label: str, total: int, out: TextIO | None) -> None:
        self._label, self._total, self._out = label, total, out
        self._done = self._failed = 0
        self._start = self._shown = time.monotonic()
        self._terminal = out is not None and out.isatty()
        if total:
            self._write(self.line(0.0), end=False)

    def advance(self, count: int = 1, *, failed: bool = False) -> None:
        self._done += count
        self._failed += count * failed
        now = time.monotonic()
        last = self._done == self._total
        if last or now - self._shown >= (REDRAW_EVERY_S if self._terminal else LINE_EVERY_S):
            self._shown = now
            self._write(self.line(now - self._start), end=last)

    def note(self, text: str) -> None:
        """Says something else on a line of its own."""
        self._write(text, end=True)

    def line(self, elapsed_s: float) -> str:
        counts = f"{self._label}  {self._done}/{self._total}"
        if not self._done:
            return counts
        rate = self._done / max(elapsed_s, 1e-9)
        left_s = (self._total - self._done) / rate
        failed = f"  {self._failed} failed" if self._failed else ""
        return f"{counts}  {rate:.2f}/s  ETA {_duration(left_s)}{failed}"

    def _write(self, line: str, *, end: bool) -> None:
        if self._out is None:
            return
        if self._terminal:
            self._out.write("\r\x1b[K" + line + ("\n" if end else ""))
        else:
            self._out.write(line + "\n")
        self._out.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
