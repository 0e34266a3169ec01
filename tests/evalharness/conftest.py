"""Fixtures of the evaluation's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evalharness.endpoint import better_adapter, run_once, samples, serve


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 samples in which the adapter repeats the references; one base reply failed."""
    directory = tmp_path_factory.mktemp("eval") / "run"
    server = better_adapter()
    server.failing.add(("base", "Question number 3?"))
    with serve(server) as url:
        run_once(directory, url, samples())
    return directory
