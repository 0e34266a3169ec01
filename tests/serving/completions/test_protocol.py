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


@pytest.mark.parametrize("one", ["a", [1]])
def test_prompts_are_counted_before_they_are_checked(one):
    assert len(CompletionRequest.model_validate({"model": "base", "prompt": [one] * 2048}).prompt) == 2048
    with pytest.raises(ValidationError, match="has 2049 prompts; at most 2048 are allowed"):
        CompletionRequest.model_validate({"model": "base", "prompt": [one] * 2049})


@pytest.mark.parametrize("prompt", [[], [[]], [[1], []], ["a", 1], [1, [2]], [True], [1.0], 5, {}, None, [["a"]]])
def test_other_forms_are_refused(prompt):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"model": "base", "prompt": prompt})
