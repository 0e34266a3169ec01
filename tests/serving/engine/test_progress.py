"""Only work without a step is a stall: neither idleness nor slow steps are."""

from __future__ import annotations

from serving.engine.engine import EngineStats
from serving.engine.progress import Progress


def test_time_counts_while_there_is_work_and_no_step():
    progress = Progress(0.0)
    seen = [
        progress.still_s(EngineStats(running, waiting, steps), now_s)
        for now_s, running, waiting, steps in [
            (5.0, 0, 0, 7),  # idle
            (9.0, 0, 0, 7),
            (10.0, 1, 0, 7),  # a request came
            (12.0, 1, 0, 7),
            (13.0, 0, 1, 7),
            (14.0, 0, 1, 8),  # a step
            (20.0, 1, 0, 8),
            (21.0, 0, 0, 8),  # idle again
        ]
    ]
    assert seen == [0, 0, 1, 3, 4, 0, 6, 0]
