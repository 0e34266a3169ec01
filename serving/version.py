"""The version of Graft that runs."""

from __future__ import annotations

import functools
import importlib.metadata


@functools.cache
def graft_version() -> str:
    """Returns the installed package's version; `source` for a source tree that was never installed."""
    try:
        return importlib.metadata.version("graft")
    except importlib.metadata.PackageNotFoundError:
        return "source"
