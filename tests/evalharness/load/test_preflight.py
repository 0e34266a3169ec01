"""The check before a load test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evalharness.errors import EvalError, ServerError
from evalharness.load.plan import LoadPlan, LoadRefused
from evalharness.load.preflight import check_server


def plan(url: str, *arms: str, api_key_env: str | None = None) -> LoadPlan:
    return LoadPlan(
        url=url,
        arms=arms,
        mixed=False,
        users=1,
        spawn_rate=1,
        seconds=1,
        out=Path("out"),
        prompts=None,
        max_tokens=8,
        rate=None,
        max_error_share=0,
        api_key_env=api_key_env,
    )


def test_every_arm_is_warmed_up_by_one_request(slow_server):
    check_server(plan(slow_server.url, "base", "starter"))
    assert [body["model"] for body in slow_server.bodies] == ["base", "starter"]


def test_an_unknown_model_is_refused_with_those_served(slow_server):
    with pytest.raises(ServerError, match=r"--arm 'wrong': the server has no such model; it lists base, starter"):
        check_server(plan(slow_server.url, "base", "wrong"))
    assert slow_server.bodies == []


def test_a_name_that_is_served_and_not_listed_is_fine(slow_server):
    check_server(plan(slow_server.url, "starter@0123456789ab"))
    assert [body["model"] for body in slow_server.bodies] == ["starter@0123456789ab"]


def test_the_key_is_sent_with_every_request(slow_server, monkeypatch):
    monkeypatch.setenv("EVAL_TEST_KEY", "k-secret")
    check_server(plan(slow_server.url, "base", api_key_env="EVAL_TEST_KEY"))
    assert slow_server.authorizations == ["Bearer k-secret"] * 3
    with pytest.raises(EvalError, match="--api-key-env EVAL_NO_SUCH_KEY"):
        check_server(plan(slow_server.url, "base", api_key_env="EVAL_NO_SUCH_KEY"))


def test_an_unreachable_server_is_refused(monkeypatch):
    monkeypatch.setattr("evalharness.client.FIRST_WAIT_S", 0.001)
    with pytest.raises(ServerError, match=re.escape("--url http://127.0.0.1:1: no server answers")):
        check_server(plan("http://127.0.0.1:1", "base"))


def test_an_arm_that_fails_its_first_request_is_refused(slow_server):
    slow_server.mode = "busy"
    with pytest.raises(LoadRefused, match="--arm base: a first request failed with http_error"):
        check_server(plan(slow_server.url, "base"))
