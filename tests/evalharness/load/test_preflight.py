"""The check before a load test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evalharness.load.plan import LoadPlan, LoadRefused
from evalharness.load.preflight import check_server


def plan(url: str, *arms: str) -> LoadPlan:
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
    )


def test_every_arm_is_warmed_up_by_one_request(slow_server):
    check_server(plan(slow_server.url, "base", "starter"))
    assert [body["model"] for body in slow_server.bodies] == ["base", "starter"]


def test_an_unknown_model_is_refused_with_those_served(slow_server):
    with pytest.raises(LoadRefused, match=r"--arm wrong: not served at .*; it serves base, starter"):
        check_server(plan(slow_server.url, "base", "wrong"))
    assert slow_server.bodies == []


def test_an_unreachable_server_is_refused():
    with pytest.raises(LoadRefused, match=re.escape("--url http://127.0.0.1:1: cannot be reached")):
        check_server(plan("http://127.0.0.1:1", "base"))


def test_an_arm_that_fails_its_first_request_is_refused(slow_server):
    slow_server.mode = "busy"
    with pytest.raises(LoadRefused, match="--arm base: a first request failed with http_error"):
        check_server(plan(slow_server.url, "base"))
