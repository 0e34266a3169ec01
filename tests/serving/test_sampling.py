"""The room for a reply is counted to the token, and n choices differ by seed alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from serving.completions.protocol import CompletionRequest
from serving.engine.engine import Feature
from serving.engine.vocabulary import read_vocabulary
from serving.errors import BadRequest, ContextTooLong, UnsupportedField
from serving.registry.boot import open_registry
from serving.response_format import ANY_OBJECT
from serving.sampling import SamplingFields, choices_for, refuse_oversized, room_for
from tests.tiny import make_tokenizer


def test_planning_loads_neither_torch_nor_the_grammars_library():
    code = "import sys, serving.__main__; sys.exit(str({'torch', 'llguidance', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize(
    ("prompt", "asked", "default", "expected"),
    [(10, None, None, 90), (10, None, 16, 16), (90, None, 16, 10), (10, 90, None, 90), (100, 0, 16, 0), (10, 0, 16, 0)],
)
def test_room(prompt, asked, default, expected):
    assert room_for(prompt, asked, default, 100, "messages") == expected


@pytest.mark.parametrize(("prompt", "asked"), [(101, None), (100, None), (101, 0), (10, 91), (100, 1)])
def test_what_does_not_fit_is_refused_with_the_numbers(prompt, asked):
    with pytest.raises(ContextTooLong, match=f"{prompt} .*tokens.* 100") as caught:
        room_for(prompt, asked, None, 100, "messages")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_what_no_tokens_could_hold_is_refused_with_the_numbers():
    vocabulary = read_vocabulary(make_tokenizer())
    longest = vocabulary.longest_bytes
    refuse_oversized(["a" * longest * 60, "a" * longest * 40], vocabulary, 100, "messages")
    for texts in (["a" * longest * 60, "a" * longest * 40 + "a"], ["<|im_end|>" * 101]):
        with pytest.raises(ContextTooLong, match="at least 101 tokens and the context 100") as caught:
            refuse_oversized(texts, vocabulary, 100, "messages")
        assert caught.value.param == "messages"


@pytest.mark.parametrize(("value", "accepted"), [(1, True), (None, True), (2, False), (True, False)])
def test_only_the_best_of_that_changes_nothing_is_accepted(value, accepted):
    def read():
        return CompletionRequest.model_validate({"model": "base", "prompt": "a", "best_of": value})

    if accepted:
        assert read().n == 1
    else:
        with pytest.raises(ValidationError, match="not supported"):
            read()


def test_choices_differ_by_seed_alone(tiny_base):
    catalog = open_registry("base", tiny_base)
    model = catalog.resolve("base")
    fields = SamplingFields(model="base", n=2, seed=2**63 - 1, temperature=0.5)
    choices = choices_for(fields, model, catalog.base.vocabulary, "id", [((1, 2), 5), ((3,), 6)], 2, 1)
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert [choice.request.prompt_ids for choice in choices] == [(1, 2), (1, 2), (3,), (3,)]
    assert [choice.request.sampling.max_tokens for choice in choices] == [5, 5, 6, 6]
    assert [choice.request.sampling.seed for choice in choices[:2]] == [2**63 - 1, -(2**63)]
    assert len({choice.request.request_id for choice in choices}) == 4
    assert all(choice.request.sampling.stop_token_ids == model.stop_token_ids for choice in choices)
    unseeded = choices_for(SamplingFields(model="base", n=2), model, catalog.base.vocabulary, "id", [((1,), 5)], None)
    assert [choice.request.sampling.seed for choice in unseeded] == [None, None]


@pytest.mark.parametrize("stop", [["a", "b"], "a", [], None])
def test_stop_takes_a_text_or_a_list(stop):
    given = {"model": "base", "stop": stop}
    assert SamplingFields.model_validate(given).stop == tuple([stop] if isinstance(stop, str) else stop or ())


@pytest.mark.parametrize("stop", ["", [""], [1], 3, ["a"] * 17, ["a" * 1025], {"a": 1}])
def test_a_wrong_stop_is_refused(stop):
    with pytest.raises(ValidationError):
        SamplingFields.model_validate({"model": "base", "stop": stop})


def test_biases_are_tokens_and_numbers():
    given = SamplingFields.model_validate({"model": "base", "logit_bias": {"5": -100, "0": 1.5}})
    assert given.logit_bias == ((5, -100.0), (0, 1.5))
    assert SamplingFields.model_validate({"model": "base", "logit_bias": {}}).logit_bias == ()


@pytest.mark.parametrize(
    "bias", [[], {"a": 1}, {"-1": 1}, {"05": 1}, {"1.0": 1}, {"5": "1"}, {"5": True}, {"5": 100.1}, {"5": float("nan")}]
)
def test_a_wrong_bias_is_refused(bias):
    with pytest.raises(ValidationError):
        SamplingFields.model_validate({"model": "base", "logit_bias": bias})


def test_a_bias_on_no_token_and_a_schema_that_cannot_be_held_are_refused_before_the_engine(tiny_base):
    catalog = open_registry("base", tiny_base)
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objec"}}}
    for fields, param in (
        ({"logit_bias": {str(catalog.base.vocabulary.size): 1}}, "logit_bias"),
        ({"response_format": schema}, "response_format.json_schema.schema"),
    ):
        body = SamplingFields.model_validate({"model": "base", **fields})
        with pytest.raises(BadRequest) as caught:
            choices_for(body, catalog.resolve("base"), catalog.base.vocabulary, "id", [((1,), 5)], None)
        assert caught.value.param == param


def test_bias_and_grammar_reach_the_engine(tiny_base):
    catalog = open_registry("base", tiny_base)
    fields = {"logit_bias": {"5": 2}, "response_format": {"type": "json_object"}}
    body = SamplingFields.model_validate({"model": "base", **fields})
    (choice,) = choices_for(body, catalog.resolve("base"), catalog.base.vocabulary, "id", [((1,), 5)], None)
    assert choice.request.sampling.logit_bias == ((5, 2.0),)
    assert choice.request.sampling.grammar == ANY_OBJECT


def test_what_the_engine_lacks_is_refused_by_name():
    held = SamplingFields.model_validate({"model": "base", "response_format": {"type": "json_object"}})
    held.check_features(frozenset({Feature.GRAMMAR}))
    with pytest.raises(UnsupportedField) as caught:
        held.check_features(frozenset())
    assert caught.value.param == "response_format"
    for free in ({}, {"response_format": {"type": "text"}}):
        SamplingFields.model_validate({"model": "base", **free}).check_features(frozenset())
