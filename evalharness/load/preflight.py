"""The check before a load test: the server answers, serves every arm, and streams with usage."""

from __future__ import annotations

import ssl

import httpx
from pydantic import BaseModel, ValidationError

from evalharness.load.plan import LoadPlan, LoadRefused
from evalharness.load.prompts import load_prompts
from evalharness.load.sample import SampleStatus
from evalharness.load.stream import StreamWatch, ask, chat_body, open_client


class _Model(BaseModel):
    id: str


class _ModelList(BaseModel):
    data: list[_Model]


def check_server(plan: LoadPlan) -> None:
    """Sends each arm one request, so that the first arm measured does not pay for waking the server.

    Raises LoadRefused naming the flag to change.
    """
    with open_client(plan.url, ssl.create_default_context()) as client:
        served = _served(client, plan.url)
        for arm in plan.arms:
            if arm not in served:
                raise LoadRefused(f"--arm {arm}: not served at {plan.url}; it serves {', '.join(served) or 'nothing'}")
        for arm in plan.arms:
            _warm_up(client, arm, plan)


def _served(client: httpx.Client, url: str) -> list[str]:
    try:
        response = client.get("/v1/models")
        response.raise_for_status()
        return [model.id for model in _ModelList.model_validate_json(response.content).data]
    except httpx.HTTPStatusError as error:
        raise LoadRefused(
            f"--url {url}: /v1/models answered {error.response.status_code}; is it the right server?"
        ) from error
    except httpx.RequestError as error:
        raise LoadRefused(f"--url {url}: cannot be reached ({error}); start the server or correct the URL") from error
    except ValidationError as error:
        raise LoadRefused(f"--url {url}: /v1/models is not OpenAI's list; is it the right server?") from error


def _warm_up(client: httpx.Client, arm: str, plan: LoadPlan) -> None:
    watch = StreamWatch()
    ask(client, chat_body(arm, load_prompts(plan.prompts)[0], plan.max_tokens), watch)
    if watch.status is not SampleStatus.OK:
        raise LoadRefused(f"--arm {arm}: a first request failed with {watch.status}: {watch.error}")
    if watch.tokens is None:
        raise LoadRefused(f"--url {plan.url}: ignores stream_options.include_usage, so tokens cannot be counted")
