"""The key of the server, from the environment variable that a flag names."""

from __future__ import annotations

import os

from evalharness.errors import EvalError


def api_key(variable: str | None) -> str | None:
    """Raises EvalError where a variable is named and not set."""
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise EvalError(f"--api-key-env {variable}: that environment variable is not set; export it, or leave this out")
    return os.environ[variable]
