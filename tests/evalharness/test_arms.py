from __future__ import annotations

import pytest

from evalharness.arms import ArmLabel, arm_labels

DIGEST, OTHER = "0123456789ab", "ba9876543210"


def test_a_digest_is_cut_off_the_name():
    assert arm_labels(["base", f"org/starter@{DIGEST}"]) == {
        "base": ArmLabel("base", None),
        f"org/starter@{DIGEST}": ArmLabel("org/starter", DIGEST),
    }


@pytest.mark.parametrize("arms", [("starter", f"starter@{DIGEST}"), (f"starter@{DIGEST}", f"starter@{OTHER}")])
def test_arms_that_only_their_digest_tells_apart_keep_it(arms):
    assert [label.name for label in arm_labels(arms).values()] == list(arms)


@pytest.mark.parametrize("arm", ["@cf/meta/llama-3", "model@latest", "a@b", f"@{DIGEST}"])
def test_what_is_no_digest_stays_in_the_name(arm):
    assert arm_labels([arm])[arm] == ArmLabel(arm, None)
