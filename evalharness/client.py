"""Client: posts JSON to an OpenAI-compatible server and says how it went, with bounded retries."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import ssl
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from evalharness.errors import ServerError
from evalharness.records import SampleStatus

RETRIED_STATUSES = frozenset({429, 503})
MAX_TRIES = 5
FIRST_WAIT_S = 0.5  # doubles with each try, unless the server says how long
MAX_WAIT_S = 120.0
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Reply:
    """The last try's outcome; `body` is there exactly when the status is OK."""

    status: SampleStatus
    body: dict[str, Any] | None = None
    http_status: int | None = None
    request_id: str | None = None
    latency_s: float | None = None
    tries: int = 1
    error: str | None = None


def normalise_url(url: str) -> str:
    """Returns the server's root; a trailing /v1 is accepted. Raises ServerError for what is no HTTP URL."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        usable = False
    if not usable:
        raise ServerError("--url: must look like http://127.0.0.1:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ServerError("--url: must carry no user, password, query or fragment; name a key with --api-key-env")
    return url.rstrip("/").removesuffix("/v1")


def is_loopback(host: str) -> bool:
    """Says whether the host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Client:
    """Use as `async with`; one connection pool for all requests."""

    def __init__(
        self, url: str, *, timeout_s: float, api_key: str | None = None, verify: ssl.SSLContext | bool = True
    ) -> None:
        self.url = normalise_url(url)
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._timeout_s = timeout_s
        own = is_loopback(urlsplit(self.url).hostname or "")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=timeout,
            limits=limits,
            verify=verify,
            trust_env=not own,  # a proxy of the environment would look for this machine's server on its own
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> Reply:
        return await self._send("GET", path, None)

    async def post(self, path: str, body: dict[str, Any]) -> Reply:
        return await self._send("POST", path, body)

    async def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Reply:
        for number in range(1, MAX_TRIES + 1):
            reply, wait_s = await self._try(method, path, body, FIRST_WAIT_S * 2 ** (number - 1))
            if wait_s is None or number == MAX_TRIES:
                break
            await asyncio.sleep(min(wait_s, MAX_WAIT_S))
        return replace(reply, tries=number)

    async def _try(
        self, method: str, path: str, body: dict[str, Any] | None, backoff_s: float
    ) -> tuple[Reply, float | None]:
        """Returns the outcome, and how long to wait before the next try where there should be one."""
        start = time.perf_counter()
        try:
            # httpx's read timeout restarts with every byte; the whole reply must come in time.
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.request(method, path, json=body)
        except (TimeoutError, httpx.TimeoutException) as error:
            if isinstance(error, httpx.ConnectTimeout):
                return Reply(SampleStatus.UNREACHABLE, error="connecting timed out"), backoff_s
            return Reply(SampleStatus.TIMEOUT, error=f"no whole reply within {self._timeout_s:g} s"), None
        except httpx.ConnectError as error:
            return Reply(SampleStatus.UNREACHABLE, error=str(error) or type(error).__name__), backoff_s
        except httpx.DecodingError as error:
            return Reply(SampleStatus.INVALID_REPLY, error=f"the body cannot be decoded: {error}"), None
        except httpx.RequestError as error:
            return Reply(SampleStatus.UNREACHABLE, error=f"connection broke: {error or type(error).__name__}"), None
        reply = replace(_reply(response), latency_s=time.perf_counter() - start)
        retried = response.status_code in RETRIED_STATUSES
        return reply, _retry_after_s(response, backoff_s) if retried else None


def _reply(response: httpx.Response) -> Reply:
    code, request_id = response.status_code, response.headers.get("x-request-id")
    if not response.is_success:
        refused = 400 <= code < 500 and code not in RETRIED_STATUSES
        status = SampleStatus.REFUSED if refused else SampleStatus.HTTP_ERROR
        return Reply(status, http_status=code, request_id=request_id, error=_error_text(response))
    try:
        body = response.json()
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair could not be recorded
    except ValueError:
        body = None
    if not isinstance(body, dict):
        error = f"not a JSON object of Unicode text: {response.text[:200]!r}"
        return Reply(SampleStatus.INVALID_REPLY, http_status=code, request_id=request_id, error=error)
    return Reply(SampleStatus.OK, body, code, request_id)


def _error_text(response: httpx.Response) -> str:
    """Returns OpenAI's error message where there is one, else the start of the body."""
    text = response.text[:500]
    try:
        found = json.loads(response.text)["error"]
        text = str(found["message"]) if isinstance(found, dict) else str(found)
    except (ValueError, KeyError, TypeError):
        pass
    return f"HTTP {response.status_code}: {text}".encode(errors="replace").decode()


def _retry_after_s(response: httpx.Response, backoff_s: float) -> float:
    """Reads Retry-After, in seconds or as a date; what cannot be read falls back to the backoff."""
    value = response.headers.get("retry-after")
    if value is None:
        return backoff_s
    if value.strip().isdigit():
        return float(value)
    try:
        return max((email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return backoff_s
