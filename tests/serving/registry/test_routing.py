"""A policy shares requests by weight, and a key's arm changes only where it must."""

from __future__ import annotations

import random

import pytest

from serving.registry.routing import Policy, choose

CANARY = Policy({"stable": 90, "canary": 10})
STICKY = Policy({"stable": 90, "canary": 10}, sticky=True)
KEYS = [f"user-{number}" for number in range(4000)]


def arms(policy, keys=KEYS, name="starter"):
    return {key: choose(policy, name, key, lambda: pytest.fail("a sticky key draws nothing")) for key in keys}


def test_draws_follow_the_weights():
    drawn = [choose(CANARY, "starter", None, random.Random(seed).random) for seed in range(4000)]
    assert 0.08 < drawn.count("canary") / 4000 < 0.12
    assert choose(CANARY, "starter", None, lambda: 0.0) == "stable"
    assert choose(CANARY, "starter", None, lambda: 0.8999) == "stable"
    assert choose(CANARY, "starter", None, lambda: 0.9) == "canary"
    assert choose(CANARY, "starter", None, lambda: 1 - 2**-53) == "canary"


def test_a_key_draws_where_the_policy_is_not_sticky_and_no_key_draws_anyway():
    assert choose(CANARY, "starter", "user", lambda: 0.95) == "canary"
    assert choose(STICKY, "starter", None, lambda: 0.95) == "canary"


def test_sticky_keys_follow_the_weights_and_stay():
    found = arms(STICKY)
    assert 0.08 < list(found.values()).count("canary") / len(KEYS) < 0.12
    assert arms(STICKY) == found
    assert arms(Policy({"canary": 10, "stable": 90}, sticky=True)) == found, "the order of the weights is no matter"
    assert arms(STICKY, name="other") != found, "each name draws for itself"
    # Fixed, because a restart, or another server, has to answer alike.
    assert [key for key in KEYS[:40] if found[key] == "canary"] == ["user-10", "user-17"]


def test_a_larger_weight_moves_keys_towards_it_only():
    before, after = arms(STICKY), arms(Policy({"stable": 80, "canary": 20}, sticky=True))
    moved = {(before[key], after[key]) for key in KEYS if before[key] != after[key]}
    assert moved == {("stable", "canary")}
    third = arms(Policy({"stable": 90, "canary": 10, "next": 20}, sticky=True))
    assert {third[key] for key in KEYS if third[key] != before[key]} == {"next"}


@pytest.mark.parametrize(
    "weights", [{}, {"stable": 0}, {"stable": -1}, {"stable": 1.5}, {"stable": True}, {"stable": 10**400}]
)
def test_a_policy_without_positive_whole_weights_that_can_be_drawn_is_none(weights):
    assert Policy(weights).problems()
    assert not CANARY.problems()


def test_the_labels_of_a_policy_are_its_arms_and_its_shadow():
    assert Policy({"stable": 1}, shadow="next").labels == {"stable", "next"}
    assert CANARY.labels == {"stable", "canary"}
