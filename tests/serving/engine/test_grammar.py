"""Only tokens that lead to JSON of the schema are allowed, the end only where the JSON is whole."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import jsonschema_rs
import pytest
import torch

from serving.engine.engine import Grammar
from serving.engine.grammar import GrammarCompiler, Matcher, check_grammar
from serving.errors import BadRequest
from tests.serving.engine.schemas import SCHEMAS, record
from tests.tiny import make_tokenizer

VOCABULARY = 512  # more than the tokenizer has, as models pad theirs


@pytest.fixture(scope="module")
def compiler(tiny_base) -> GrammarCompiler:
    return GrammarCompiler(tiny_base)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_matcher(compiler: GrammarCompiler, schema: object, stop: frozenset[int] = frozenset({2})) -> Matcher:
    return compiler.compile(Grammar(json.dumps(schema)), stop)


def walk(matcher: Matcher, seed: int, *, limit: int = 400) -> tuple[list[int], bool]:
    """Draws evenly among the allowed tokens until a stop token or the end; returns the ids, and whether it ended."""
    generator, ids = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(limit):
        allowed_V = matcher.allowed(VOCABULARY)
        token = int(torch.multinomial(allowed_V.double(), 1, generator=generator))
        if token == 2:
            return ids, True
        ids.append(token)
        if matcher.accept(token):
            return ids, True
        assert matcher.problem is None
    return ids, False


@pytest.mark.parametrize("name", SCHEMAS)
def test_any_walk_through_the_allowed_tokens_fits_the_schema(name, compiler, tokenizer):
    check_grammar(Grammar(json.dumps(SCHEMAS[name])))
    ended = 0
    for seed in range(6):
        ids, whole = walk(make_matcher(compiler, SCHEMAS[name]), seed)
        ended += whole
        if whole:
            jsonschema_rs.validate(SCHEMAS[name], json.loads(tokenizer.decode(ids)))
    assert ended >= 3


def test_the_end_is_allowed_exactly_where_the_json_is_whole(compiler, tokenizer):
    matcher = make_matcher(compiler, {"type": "integer", "minimum": 10, "maximum": 999}, frozenset({0, 2}))
    ends = []
    for digit in "123":
        ends.append([bool(matcher.allowed(VOCABULARY)[stop]) for stop in (0, 2)])
        can_only_end = matcher.accept(*tokenizer.encode(digit))
    assert ends == [[False, False], [False, False], [True, True]]
    assert can_only_end


def test_no_control_token_and_no_padding_is_ever_allowed(compiler, tokenizer):
    allowed_V = make_matcher(compiler, {"type": "string"}, frozenset()).allowed(VOCABULARY)
    assert allowed_V.any()
    assert not allowed_V[:3].any()
    assert not allowed_V[len(tokenizer) :].any()


def test_a_stop_token_that_the_model_does_not_have_harms_nothing(compiler):
    assert make_matcher(compiler, {"const": 1}, frozenset({10**6})).allowed(VOCABULARY).any()


def test_matchers_of_one_schema_do_not_share_their_place(compiler):
    first, second = [make_matcher(compiler, {"enum": ["a", "b"]}) for _ in range(2)]
    before = second.allowed(VOCABULARY)
    first.accept(int(before.nonzero()[0]))
    assert torch.equal(second.allowed(VOCABULARY), before)
    assert not torch.equal(first.allowed(VOCABULARY), before)


def test_a_token_that_is_not_allowed_is_a_problem_of_this_matcher_alone(compiler, tokenizer):
    first, second = [make_matcher(compiler, {"const": 1}) for _ in range(2)]
    assert not first.accept(tokenizer.encode("x")[0])
    assert first.problem is not None
    assert first.problem.code == "unusable_schema"
    assert second.problem is None


def test_many_threads_may_compile_at_once(tiny_base):
    compiler = GrammarCompiler(tiny_base)
    with ThreadPoolExecutor(4) as pool:
        masks = list(pool.map(lambda _: make_matcher(compiler, {"const": 1}).allowed(VOCABULARY), range(8)))
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objec"}, "objec"),
        ({"not": {}}, "not"),
        ({"$ref": "http://elsewhere/schema"}, "elsewhere"),
        ({"type": "string", "pattern": "a(?=b)"}, "regex"),
        ({"enum": []}, "empty"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        (["a"], "object"),
        (record(a={"type": "array", "uniqueItems": True}), "uniqueItems"),
        ({"$ref": "#"}, "NoExtension"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_with_the_librarys_reason(schema, reason):
    with pytest.raises(BadRequest, match=reason) as caught:
        check_grammar(Grammar(json.dumps(schema)))
    assert caught.value.param == "response_format.json_schema.schema"


def test_text_that_is_no_json_is_refused():
    for text in ("", "{", '{"minimum": NaN}', '{"const": "\\ud800"}', '{"items":' * 5000 + "{}" + "}" * 5000):
        with pytest.raises(BadRequest, match="cannot be followed"):
            check_grammar(Grammar(text))


LADDER = {f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}, {"$ref": f"#/$defs/d{at + 1}"}]} for at in range(13)}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"enum": ["a" * 200 + str(at) for at in range(200)]}, "characters"),
        ({"allOf": [{"type": "string", "pattern": f".*{at}.*"} for at in range(20)]}, "joins schemas 19 times"),
        ({"$defs": {**LADDER, "d13": {"pattern": "a"}}, "$ref": "#/$defs/d0"}, "joins schemas 13 times"),
    ],
)
def test_a_schema_that_would_take_minutes_to_check_is_refused_before(schema, reason):
    with pytest.raises(BadRequest, match=reason):
        check_grammar(Grammar(json.dumps(schema)))


def test_a_grammar_that_cannot_go_on_is_a_problem_not_an_exception(compiler):
    matcher = make_matcher(compiler, {"$ref": "#"})  # a schema that only the mask shows to have no end
    assert matcher.allowed(VOCABULARY).shape == (VOCABULARY,)
    assert matcher.problem is not None
    assert "cannot be followed: NoExtension" in matcher.problem.message
