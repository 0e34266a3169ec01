"""The limits: how many requests and tokens each key may use a minute, and how many requests at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serving.auth import Caller, Limits
from serving.errors import BadRequest, RateLimited

MAX_RETRY_S = 120  # OpenAI's client ignores a longer Retry-After
BUSY_RETRY_S = 1  # when another request of the same key ends is unknown


class Bucket:
    """Holds a minute's worth and refills steadily, so that no minute has an edge to wait for."""

    __slots__ = ("_at_s", "_level", "capacity")

    def __init__(self, capacity: int, now_s: float) -> None:
        self.capacity = capacity
        self._level = float(capacity)
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        self._level = min(self.capacity, self._level + (now_s - self._at_s) * self.capacity / 60)
        self._at_s = now_s
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """Returns how long it takes until `amount` is there."""
        return max(0.0, amount - self.level(now_s)) * 60 / self.capacity

    def add(self, amount: float, now_s: float) -> None:
        """Gives back, or with a negative amount takes."""
        self._level = min(self.capacity, self.level(now_s) + amount)


@dataclass(slots=True)
class Spending:
    """What a request has used so far of the tokens that are reserved for it."""

    tokens: int = 0


@dataclass(slots=True)
class _Account:
    limits: Limits = field(default_factory=Limits)
    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: int = 0


class Limiter:
    """Keeps an account for each key; `on_refusal` hears of a key's name and which limit refused it."""

    def __init__(
        self, on_refusal: Callable[[str, str], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_refusal = on_refusal
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @contextmanager
    def request(self, caller: Caller) -> Iterator[None]:
        """Counts a request while it runs. Raises RateLimited where the key has too many, now or in this minute."""
        account, now_s = self._account(caller), self._clock()
        limits = account.limits
        if limits.max_concurrent is not None and account.running >= limits.max_concurrent:
            self._refuse(caller, "concurrency", f"may run {limits.max_concurrent} requests at once", BUSY_RETRY_S)
        if account.requests is not None:
            if wait_s := account.requests.wait_s(1, now_s):
                self._refuse(caller, "requests", f"may send {limits.requests_per_minute} requests a minute", wait_s)
            account.requests.add(-1, now_s)
        account.running += 1
        try:
            yield
        finally:
            account.running -= 1

    @contextmanager
    def tokens(self, caller: Caller, most: int) -> Iterator[Spending]:
        """Reserves the most that a request can use, and gives back what its Spending has not used by the end.

        Raises RateLimited where the key has not as many left, and BadRequest where it never will.
        """
        bucket, spending = self._account(caller).tokens, Spending()
        if bucket is None:
            yield spending
            return
        self._take_tokens(caller, bucket, most)
        try:
            yield spending
        finally:
            bucket.add(most - spending.tokens, self._clock())

    def headers(self, caller: Caller) -> dict[str, str]:
        """Returns OpenAI's x-ratelimit headers for the limits that the key has."""
        account, now_s = self._account(caller), self._clock()
        headers: dict[str, str] = {}
        for what, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{what}"] = str(bucket.capacity)
                headers[f"x-ratelimit-remaining-{what}"] = str(int(bucket.level(now_s)))
                headers[f"x-ratelimit-reset-{what}"] = _duration(bucket.wait_s(bucket.capacity, now_s))
        return headers

    def _take_tokens(self, caller: Caller, bucket: Bucket, most: int) -> None:
        if most > bucket.capacity:
            raise BadRequest(
                f"the request can use {most} tokens, prompt and completion, but key {caller.name!r} may use "
                f"{bucket.capacity} a minute; set a smaller max_tokens or n, or send a shorter prompt",
                code="over_tokens_per_minute",
            )
        now_s = self._clock()
        if wait_s := bucket.wait_s(most, now_s):
            needs = f"may use {bucket.capacity} tokens a minute, and this request can use {most}"
            self._refuse(caller, "tokens", needs, wait_s)
        bucket.add(-most, now_s)

    def _refuse(self, caller: Caller, limit: str, reason: str, wait_s: float) -> None:
        if self._on_refusal is not None:
            self._on_refusal(caller.name, limit)
        retry_s = min(MAX_RETRY_S, max(1, math.ceil(wait_s)))
        raise RateLimited(f"key {caller.name!r} {reason}; try again in {retry_s} s", retry_after_s=retry_s)

    def _account(self, caller: Caller) -> _Account:
        """An entry that was changed in the key file starts with full buckets."""
        account = self._accounts.setdefault(caller.name, _Account())
        if account.limits != caller.limits:
            now_s = self._clock()
            account.limits = caller.limits
            account.requests = _bucket(caller.limits.requests_per_minute, now_s)
            account.tokens = _bucket(caller.limits.tokens_per_minute, now_s)
        return account


def _bucket(capacity: int | None, now_s: float) -> Bucket | None:
    return None if capacity is None else Bucket(capacity, now_s)


def _duration(seconds: float) -> str:
    """Writes a time as OpenAI does: 120ms, 1s, 6m0s."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
