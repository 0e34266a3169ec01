"""A prompt has four forms, and nothing between them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serving.completions.protocol import MAX_IDS, CompletionRequest


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


@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: [ids[:9], ids[9:]]])
def test_token_ids_are_counted_over_all_prompts(form):
    most = form([7] * MAX_IDS)
    assert sum(map(len, CompletionRequest.model_validate({"model": "base", "prompt": most}).prompt)) == MAX_IDS
    with pytest.raises(ValidationError, match=f"has {MAX_IDS + 1} token ids; at most {MAX_IDS} are allowed"):
        CompletionRequest.model_validate({"model": "base", "prompt": form([7] * (MAX_IDS + 1))})


@pytest.mark.parametrize("prompt", [[], [[]], [[1], []], ["a", 1], [1, [2]], [True], [1.0], 5, {}, None, [["a"]]])
def test_other_forms_are_refused(prompt):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"model": "base", "prompt": prompt})
