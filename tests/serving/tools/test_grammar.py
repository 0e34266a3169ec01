"""What the grammar allows are calls of the tools with arguments that fit, and text where text is free."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema_rs
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from serving.engine.engine import Grammar
from serving.engine.grammar import GrammarCompiler, Matcher
from serving.errors import BadRequest
from serving.tools.grammar import call_grammar
from serving.tools.parser import CallParser
from serving.tools.protocol import FunctionDefinition
from tests.serving.tools.templates import CLOCK, WEATHER
from tests.serving.tools.test_parser import HERMES, LLAMA, folded

FUNCTIONS = [FunctionDefinition.model_validate(tool["function"]) for tool in (WEATHER, CLOCK)]
FORMS = {"marks": HERMES, "no marks": LLAMA}


@pytest.fixture(scope="module")
def compiler(tiny_base) -> GrammarCompiler:
    return GrammarCompiler(tiny_base)


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


def grammar(form, functions=FUNCTIONS, *, several=False, free_text=False) -> Grammar:
    return call_grammar(form, list(enumerate(functions)), several=several, free_text=free_text)


def accepts(compiler: GrammarCompiler, tokenizer, given: Grammar, text: str) -> bool:
    matcher = compiler.compile(given, frozenset({2}))
    for token in tokenizer.encode(text):
        if not matcher.allowed(512)[token]:
            return False
        matcher.accept(token)
    return bool(matcher.allowed(512)[2])


def walk(matcher: Matcher, seed: int, limit: int) -> list[int] | None:
    generator, ids = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(limit):
        token = int(torch.multinomial(matcher.allowed(512).double(), 1, generator=generator))
        if token == 2:
            return ids
        ids.append(token)
        if matcher.accept(token):
            return ids
        assert matcher.problem is None
    return None


def calls_in(text: str, form, *, several: bool) -> tuple[str, list[tuple[str, str]]]:
    parser = CallParser(form, frozenset(function.name for function in FUNCTIONS), several=several)
    events = [*parser.push(text), *parser.end(truncated=False)]
    assert not parser.broken
    return folded(events)


@pytest.mark.parametrize(("name", "several"), [("marks", False), ("marks", True), ("no marks", False)])
def test_any_walk_is_calls_with_arguments_that_fit(name, several, compiler, tokenizer):
    form, counts, called = FORMS[name], set[int](), set[str]()
    given = grammar(form, several=several)
    for seed in range(25):
        ids = walk(compiler.compile(given, frozenset({2})), seed, 600)
        if ids is None:
            continue
        content, calls = calls_in(tokenizer.decode(ids), form, several=several)
        assert not content
        counts.add(len(calls))
        for function, arguments in calls:
            called.add(function)
            schema = next(each for each in FUNCTIONS if each.name == function).arguments_schema()
            jsonschema_rs.validate(schema, json.loads(arguments))
    assert called == {"get_weather", "clock"}
    assert 1 in counts
    assert (max(counts) > 1) == several


def test_text_is_free_until_a_call_begins(compiler, tokenizer):
    marked, alone = grammar(HERMES, free_text=True, several=True), grammar(LLAMA, free_text=True)
    call = HERMES.before + "clock" + HERMES.between + "{}" + HERMES.after
    plain = LLAMA.before + "clock" + LLAMA.between + "{}" + LLAMA.after
    for text in ("", "hi <b> {}", "a </tool_call> b", f"let me see\n{call}", f"{call}\n{call} done"):
        assert accepts(compiler, tokenizer, marked, text), text
    for text in ("<tool_call>", "<tool_call>\nx", call.replace("clock", "time"), call.replace("{}", '{"a": 1}')):
        assert not accepts(compiler, tokenizer, marked, text), text
    for text in ("", " hi {", plain):
        assert accepts(compiler, tokenizer, alone, text), text
    for text in ("{", '{"answer": 1}', plain.replace("{}", '{"a": 1}')):
        assert not accepts(compiler, tokenizer, alone, text), text


def test_a_mark_may_be_one_token_of_the_vocabulary(tiny_base, tmp_path):
    """Qwen2.5 has <tool_call> as an added token that is not special."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(tiny_base).save_pretrained(tmp_path)
    call = HERMES.before + "clock" + HERMES.between + "{}" + HERMES.after
    first, second = len(tokenizer) - 2, len(tokenizer) - 1
    assert {first, second} <= set(tokenizer.encode(call))
    form = replace(HERMES, mark_ids={"<tool_call>": first, "</tool_call>": second})
    compiler = GrammarCompiler(Path(tmp_path))
    assert accepts(compiler, tokenizer, grammar(form, several=True), f"{call}\n{call}")
    assert not accepts(compiler, tokenizer, grammar(form, several=True), "")
    for text, fits in (("hi", True), (f"hi{call}\n{call} b", True), (call.replace("clock", "x"), False)):
        assert accepts(compiler, tokenizer, grammar(form, free_text=True, several=True), text) is fits
    spelled = tokenizer.encode("a <tool_call") + tokenizer.encode(">")
    matcher = compiler.compile(grammar(form, free_text=True), frozenset({2}))
    assert first not in spelled
    for token in spelled:
        matcher.accept(token)
    assert matcher.problem is None
    assert tokenizer.decode(matcher.allowed(512).nonzero()[0]) == "\n"


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"not": {}}}},
        {"type": "object", "properties": {"a": {"type": "objec"}}},
        {"properties": {"a": {"type": "string", "pattern": "a(?=b)"}}},
    ],
)
def test_parameters_that_cannot_be_held_are_named_with_their_place(parameters):
    bad = FunctionDefinition.model_validate({"name": "bad", "parameters": parameters})
    with pytest.raises(BadRequest) as caught:
        call_grammar(HERMES, [(0, FUNCTIONS[0]), (3, bad)], several=True, free_text=False)
    assert (caught.value.param, caught.value.code) == ("tools[3].function.parameters", "unusable_schema")


@pytest.mark.parametrize(
    ("parameters", "count", "reason"),
    [
        ({"allOf": [{"pattern": "a"}] * 8}, 2, "joined 14 times"),
        ({"properties": {"a": {"enum": ["a" * 15_000]}}}, 5, "characters together"),
    ],
)
def test_tools_that_would_take_long_together_are_refused(parameters, count, reason):
    tools = [FunctionDefinition.model_validate({"name": f"f{at}", "parameters": parameters}) for at in range(count)]
    with pytest.raises(BadRequest, match=reason) as caught:
        grammar(HERMES, tools)
    assert caught.value.param == "tools"
    call_grammar(HERMES, [(0, tools[0])], several=False, free_text=False)


def test_references_are_to_the_functions_own_definitions(compiler, tokenizer):
    leaf = {"$defs": {"leaf": {"enum": [1]}}, "properties": {"a": {"$ref": "#/$defs/leaf"}}, "required": ["a"]}
    twin = {**leaf, "$defs": {"leaf": {"enum": [2]}}}
    functions = [
        FunctionDefinition.model_validate({"name": name, "parameters": schema})
        for name, schema in (("one", leaf), ("two", twin))
    ]
    given = grammar(HERMES, functions)
    for name, value, fits in (("one", 1, True), ("two", 2, True), ("one", 2, False), ("two", 1, False)):
        text = HERMES.before + name + HERMES.between + json.dumps({"a": value}) + HERMES.after
        assert accepts(compiler, tokenizer, given, text) is fits
