from __future__ import annotations

import pytest

from evalharness.config import api_key
from evalharness.errors import EvalError


def test_the_key_is_that_of_the_named_variable_and_none_without_a_name(monkeypatch):
    monkeypatch.setenv("EVAL_TEST_KEY", "k-secret")
    assert api_key("EVAL_TEST_KEY") == "k-secret"
    assert api_key(None) is None


@pytest.mark.parametrize("value", [None, ""])
def test_a_named_variable_that_is_not_set_is_an_error(monkeypatch, value):
    monkeypatch.delenv("EVAL_TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("EVAL_TEST_KEY", value)
    with pytest.raises(EvalError, match="--api-key-env EVAL_TEST_KEY"):
        api_key("EVAL_TEST_KEY")
