"""The grammar of calls: what a reply has to be, so that its calls are those of the tools, with arguments that fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from serving.engine.engine import Grammar, Syntax
from serving.engine.grammar import check_grammar, check_grammars
from serving.tools.call_format import CallFormat
from serving.tools.protocol import FunctionDefinition

_ANY = r"/(.|\n)*/"


def call_grammar(
    form: CallFormat, functions: Sequence[tuple[int, FunctionDefinition]], *, several: bool, free_text: bool
) -> Grammar:
    """Returns what allows calls alone or, with `free_text`, calls in text. Functions come with their places in tools.

    Raises BadRequest for the first function whose parameters cannot be held.
    """
    schemas = [
        Grammar(json.dumps(function.arguments_schema()), field=f"tools[{place}].function.parameters")
        for place, function in functions
    ]
    check_grammars(schemas, "tools")
    named = [(function.name, schema.text) for (_, function), schema in zip(functions, schemas, strict=True)]
    spelled, exact = (
        _grammar(form, named, tokens, several=several, free_text=free_text) for tokens in ({}, form.mark_ids)
    )
    check_grammar(spelled)  # without a tokenizer, so without the ids of one
    return exact


def _grammar(
    form: CallFormat,
    functions: Sequence[tuple[str, str]],
    tokens: Mapping[str, int],
    *,
    several: bool,
    free_text: bool,
) -> Grammar:
    """`tokens` are marks that are one token, which llguidance takes for special: no spelling matches them."""
    start = _texts(form, tokens, several=several) if free_text else _calls(form, several=several)
    opening = form.opening if free_text else ""
    head = form.before[form.before.index(opening) + len(opening) :]
    calls = [
        f"call_{at}: {_terms(head + name + form.between, tokens)} %json {schema} {_terms(form.after, tokens)}"
        for at, (name, schema) in enumerate(functions)
    ]
    call = "call: " + " | ".join(f"call_{at}" for at in range(len(functions)))
    return Grammar("\n".join(["%llguidance {}", *start, call, *calls, ""]), Syntax.LARK, "tools")


def _calls(form: CallFormat, *, several: bool) -> list[str]:
    if not several:
        return ["start: call"]
    return [f"start: call ({json.dumps(form.gap)} call)*" if form.gap else "start: call+"]


def _texts(form: CallFormat, tokens: Mapping[str, int], *, several: bool) -> list[str]:
    """An opening mark in a text begins a call; where calls have no marks, a brace at the reply's start does."""
    if not form.opening:
        return ["start: TEXT | call", r"TEXT: /\s*([^{\s](.|\n)*)?/"]
    token = f" | TEXT {_terms(form.opening, tokens)}" if form.opening in tokens else ""
    return [
        "start: (lead call)* rest" if several else "start: lead call | rest",
        f"lead: spelled{token}",
        f"spelled[lazy]: TEXT {json.dumps(form.opening)}",
        "rest: TEXT",
        f"TEXT: {_ANY}",
    ]


def _terms(text: str, tokens: Mapping[str, int]) -> str:
    """Returns `text` as Lark writes it: strings, and tokens by their ids."""
    for mark, token_id in tokens.items():
        before, found, after = text.partition(mark)
        if found:
            return " ".join(
                [*map(json.dumps, filter(None, [before])), f"<[{token_id}]>", _terms(after, tokens)]
            ).strip()
    return json.dumps(text) if text else ""
