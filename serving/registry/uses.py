"""The uses: how many requests hold each revision, and when the last one has ended."""

from __future__ import annotations

import asyncio
from collections import Counter


class Uses:
    """Counts by (name, digest)."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._waiting: dict[tuple[str, str], list[asyncio.Future[None]]] = {}

    def count(self, key: tuple[str, str]) -> int:
        return self._counts[key]

    def begin(self, key: tuple[str, str]) -> None:
        self._counts[key] += 1

    def end(self, key: tuple[str, str]) -> None:
        self._counts[key] -= 1
        if self._counts[key] == 0:
            del self._counts[key]
            for waiter in self._waiting.pop(key, []):
                if not waiter.done():
                    waiter.set_result(None)

    async def ended(self, key: tuple[str, str]) -> None:
        """Returns once no request holds the revision."""
        if self._counts[key]:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(key, []).append(waiter)
            await waiter
