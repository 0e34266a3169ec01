"""The check before a load test: the server answers, serves every arm, and streams with usage."""

from __future__ import annotations

import asyncio
import ssl

import httpx

from evalharness.client import Client
from evalharness.config import api_key
from evalharness.load.plan import LoadPlan, LoadRefused
from evalharness.load.prompts import load_prompts
from evalharness.load.sample import SampleStatus
from evalharness.load.stream import StreamWatch, ask, chat_body, open_client
from evalharness.revisions import served_revisions

LOOK_UP_TIMEOUT_S = 30.0


def check_server(plan: LoadPlan) -> None:
    """Sends each arm one request, so that the first arm measured does not pay for waking the server.

    Raises EvalError naming the flag to change.
    """
    key = api_key(plan.api_key_env)
    tls = ssl.create_default_context()
    asyncio.run(_look_up(plan, key, tls))
    with open_client(plan.url, tls, key) as client:
        for arm in plan.arms:
            _warm_up(client, arm, plan)


async def _look_up(plan: LoadPlan, key: str | None, tls: ssl.SSLContext) -> None:
    async with Client(plan.url, timeout_s=LOOK_UP_TIMEOUT_S, api_key=key, verify=tls) as client:
        await served_revisions(client, plan.arms)


def _warm_up(client: httpx.Client, arm: str, plan: LoadPlan) -> None:
    watch = StreamWatch()
    ask(client, chat_body(arm, load_prompts(plan.prompts)[0], plan.max_tokens), watch)
    if watch.status is not SampleStatus.OK:
        raise LoadRefused(f"--arm {arm}: a first request failed with {watch.status}: {watch.error}")
    if watch.tokens is None:
        raise LoadRefused(f"--url {plan.url}: ignores stream_options.include_usage, so tokens cannot be counted")
