"""The version is the package's, and a source tree that was never installed can serve too."""

from __future__ import annotations

import importlib.metadata

import pytest

from serving.version import graft_version


@pytest.fixture(autouse=True)
def _fresh() -> None:
    graft_version.cache_clear()


def test_it_is_the_installed_packages():
    assert graft_version() == importlib.metadata.version("graft")


def test_a_source_tree_says_so(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert graft_version() == "source"
    graft_version.cache_clear()
