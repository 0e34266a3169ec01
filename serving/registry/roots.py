"""The adapter roots: the only directories that an administrator's requests may name adapters in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serving.errors import PathRefused


class AdapterRoots:
    """Resolves relative names below the configured roots; nothing outside them can be told from nothing at all."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(root.resolve() for root in roots)

    def locate(self, source: Path) -> Path:
        """Returns the real directory of a name such as `runs/starter/adapter`; raises PathRefused."""
        text = str(source)[:200]
        if not self._roots:
            raise _refused(f"path {text!r}: this server reads no adapters by path; start it with --adapter-root DIR")
        if source.is_absolute() or ".." in source.parts or not source.parts or "\0" in str(source):
            raise _refused(f"path {text!r}: give a path relative to an adapter root, without '..'")
        for root in self._roots:
            found = _below(root, source)
            if found is not None:
                return found
        raise _refused(f"path {text!r}: no adapter root has such a directory; give one below an --adapter-root")


def _below(root: Path, source: Path) -> Path | None:
    try:
        real = (root / source).resolve(strict=True)
    except (OSError, RuntimeError):  # absent, not readable, too long, or links in a circle
        return None
    return real if real.is_relative_to(root) and real != root and real.is_dir() else None


def _refused(message: str) -> PathRefused:
    return PathRefused(message, param="path")
