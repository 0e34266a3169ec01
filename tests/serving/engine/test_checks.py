"""What an engine cannot run is refused with the number and the limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from serving.engine.checks import check_request, check_sizes, not_loaded
from serving.engine.engine import GenerationRequest, Sampling, Variant, VariantKind
from serving.errors import BadRequest, ContextTooLong

BASE = Variant("base", VariantKind.BASE, "b", Path("base"))


def request_of(*prompt_ids: int, max_tokens: int = 1) -> GenerationRequest:
    return GenerationRequest("r", BASE, prompt_ids, Sampling(max_tokens=max_tokens))


def check(request: GenerationRequest) -> None:
    check_request(request, vocabulary=100, context_length=8)


@pytest.mark.parametrize(
    ("request_", "error", "param", "reason"),
    [
        (request_of(), BadRequest, "prompt", "no tokens"),
        (request_of(1, 100), BadRequest, "prompt", "id 100: this model has 0 to 99"),
        (request_of(-1), BadRequest, "prompt", "id -1"),
        (request_of(1, max_tokens=-1), BadRequest, "max_tokens", "max_tokens -1"),
        (request_of(*range(8)), ContextTooLong, "prompt", "8 tokens"),
        (request_of(*range(9), max_tokens=0), ContextTooLong, "prompt", "9 tokens"),
    ],
)
def test_what_cannot_run_is_refused_by_field(request_, error, param, reason):
    with pytest.raises(error, match=reason) as caught:
        check(request_)
    assert caught.value.param == param


def test_what_fits_passes_to_the_last_token():
    check(request_of(0, 99))
    check(request_of(*range(7), max_tokens=5))
    check(request_of(*range(8), max_tokens=0))


def test_sizes_are_the_models_unless_given(tiny_base):
    assert check_sizes(tiny_base, 1, None) == 512
    assert check_sizes(tiny_base, 1, 100) == 100
    for max_batch, context_length, reason in ((0, None, "max_batch 0"), (1, 513, "1 to 512"), (1, 0, "1 to 512")):
        with pytest.raises(ValueError, match=reason):
            check_sizes(tiny_base, max_batch, context_length)


def test_a_missing_variant_is_named():
    assert not_loaded(replace(BASE, name="other")).message == "model 'other' is not loaded in the engine; add it first"
