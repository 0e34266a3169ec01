"""A key's model names cover every revision and label of them, and nothing else."""

from __future__ import annotations

import pytest

from serving.auth import ANONYMOUS, Caller, check_admin, check_metrics
from serving.errors import Forbidden

ANN = Caller("ann", frozenset(("starter", "team/a")))


@pytest.mark.parametrize("name", ["starter", "starter@0123abcd", "starter:canary", "team/a", "team/a:stable"])
def test_a_name_covers_its_revisions_and_labels(name):
    assert ANN.allows(name)
    ANN.check_model(name)


@pytest.mark.parametrize("name", ["", "base", "starter2", "start", "team", "Starter", "@starter", "base@starter", "*"])
def test_another_name_is_forbidden_and_the_own_ones_are_told(name):
    assert not ANN.allows(name)
    with pytest.raises(Forbidden, match=r"key 'ann' may not use model .* only starter, team/a") as caught:
        ANN.check_model(name)
    assert (caught.value.status, caught.value.code, caught.value.param) == (403, "model_not_allowed", "model")


def test_a_star_is_every_model_and_no_names_are_none():
    assert Caller("all").allows("anything@0")
    assert not Caller("none", frozenset()).allows("base")


def test_administration_needs_an_admin_key():
    check_admin(Caller("root", is_admin=True))
    for caller, remedy in ((ANN, "kind = "), (ANONYMOUS, r"start the server with --keys FILE")):
        with pytest.raises(Forbidden, match=remedy) as caught:
            check_admin(caller)
        assert caught.value.code == "admin_key_required"


def test_metrics_need_an_admin_key_or_one_made_for_them():
    for caller in (ANONYMOUS, Caller("root", is_admin=True), Caller("prometheus", frozenset(), reads_metrics=True)):
        check_metrics(caller)
    with pytest.raises(Forbidden, match="metrics = true"):
        check_metrics(ANN)
