"""A prompt has four forms, and nothing between them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serving.completions.protocol import CompletionRequest


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_the_four_forms(prompt, expected):
    assert CompletionRequest.model_validate({"model": "base", "prompt": prompt}).prompt == expected


@pytest.mark.parametrize("prompt", [[], [[]], [[1], []], ["a", 1], [1, [2]], [True], [1.0], 5, {}, None, [["a"]]])
def test_other_forms_are_refused(prompt):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"model": "base", "prompt": prompt})
