"""The bounds of a load test."""

from __future__ import annotations

import argparse

import pytest

from evalharness.errors import EvalError
from evalharness.load.command import add_parser
from evalharness.load.plan import LoadRefused, Scenario, plan_from


def planned(*flags: str, url="http://127.0.0.1:8000/v1/", arms=("base", "starter")):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    named = [part for arm in arms for part in ("--arm", arm)]
    return plan_from(parser.parse_args(["load", "--url", url, "--out", "out", *named, *flags]))


def test_each_arm_runs_alone_and_then_mixed():
    plan = planned("--mixed")
    assert plan.scenarios == (
        Scenario("base", ("base",)),
        Scenario("starter", ("starter",)),
        Scenario("mixed", ("base", "starter")),
    )
    assert [scenario.name for scenario in planned().scenarios] == ["base", "starter"]
    assert Scenario("org/model@0a1b2c", ()).file_stem == "locust_org%2Fmodel@0a1b2c"


def test_a_pinned_arm_is_called_by_its_name():
    plan = planned("--mixed", arms=("base", "starter@0123456789ab"))
    assert [plan.name(scenario.name) for scenario in plan.scenarios] == ["base", "starter", "mixed"]


def test_the_key_is_kept_as_the_name_of_its_variable():
    assert planned("--api-key-env", "EVAL_TEST_KEY").api_key_env == "EVAL_TEST_KEY"
    assert planned().api_key_env is None


def test_the_url_loses_its_v1_and_users_start_at_once():
    plan = planned("--users", "12")
    assert plan.url == "http://127.0.0.1:8000"
    assert plan.spawn_rate == 12
    assert plan.rate is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--users", "1001"], r"--users 1001: must lie between 1 and 1000"),
        (["--users", "0"], r"--users 0"),
        (["--seconds", "3601"], r"--seconds 3601: must lie between 1 and 3600"),
        (["--max-tokens", "0"], r"--max-tokens 0"),
        (["--arrival", "open"], r"--rate None with --arrival open"),
        (["--rate", "3"], r"--rate 3.0 with --arrival closed"),
        (["--arrival", "open", "--rate", "nan"], r"--rate nan"),
        (["--max-error-share", "1.5"], r"--max-error-share 1.5"),
        (["--arm", "base"], r"--arm base: given 2 times"),
        (["--mixed", "--arm", "mixed"], r"--arm 'mixed'"),
        (["--mixed", "--arm", "all@0123456789ab"], r"--arm 'all@0123456789ab'"),
        (["--prompts", "/no/such/file.txt"], r"--prompts /no/such/file.txt: cannot be read"),
    ],
)
def test_a_flag_out_of_bounds_is_refused_by_name(flags, says):
    with pytest.raises(EvalError, match=says):
        planned(*flags)


def test_mixing_one_arm_is_refused():
    with pytest.raises(LoadRefused, match="--mixed with 1 arm"):
        planned("--mixed", arms=["base"])


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://a:b@127.0.0.1", "localhost:8000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:99999"],
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(EvalError, match="--url"):
        planned(url=url)


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000", "https://example.org", "http://127.0.0.1.example.org"])
def test_another_host_needs_consent(url):
    with pytest.raises(LoadRefused, match="--allow-remote"):
        planned(url=url)
    assert planned("--allow-remote", url=url).url == url


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.8.0.1:1", "http://[::1]:1"])
def test_loopback_needs_none(url):
    assert planned(url=url).url == url
