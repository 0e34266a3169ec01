"""Fixtures that several test folders share: a tiny base with two adapters, and the real app over a FakeEngine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import make_fake_app, make_tiny_adapter, make_tiny_model, running_server


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_tiny_adapter(tiny_base, root / name, name, seed) for name, seed in (("starter", 1), ("other", 2))
    }


@pytest.fixture(scope="session")
def fake_server(tiny_base: Path, tiny_adapters: dict[str, Path]) -> Iterator[str]:
    """The URL of the real app with a FakeEngine: models "base", "starter" and "other"."""
    app, _ = make_fake_app(tiny_base, tiny_adapters)
    with running_server(app) as url:
        yield url
