"""The grammar matcher: which tokens may come next, so that a completion is JSON that fits its schema.

llguidance walks the schema beside the model. With a vocabulary of 49k, on the 2-core machine, a schema compiles in
1 ms and a token costs 0.08 ms (0.3 ms at the 99th percentile), which is why that happens inside the step.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.engine.engine import Grammar, Syntax
from serving.errors import BadRequest

if TYPE_CHECKING:  # planning needs this file under every engine, and the fake one needs neither
    import torch
    from llguidance import LLMatcher, LLTokenizer

# V vocabulary
MAX_REASON_CHARACTERS = 300
# One thread checks every schema: these two keep that to seconds at worst, and mostly to 1 ms. Its time grows with
# the size, and doubles with each pattern that another is joined to (118 s for an allOf of 20).
MAX_SCHEMA_CHARACTERS = 16_384
MAX_LARK_CHARACTERS = 65_536  # the schemas of all functions that may be called
MAX_JOINS = 12


class Matcher:
    """One completion's place in its grammar; used by one thread, in whose steps it raises nothing: see `problem`."""

    def __init__(self, matcher: LLMatcher, field: str, stop_token_ids: AbstractSet[int]) -> None:
        self._matcher = matcher
        self._field = field
        self._stop_token_ids = stop_token_ids

    @property
    def problem(self) -> BadRequest | None:
        """Returns why the grammar can be followed no further, None while it can."""
        return _refusal(self._matcher.get_error(), self._field) if self._matcher.is_error() else None

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Returns for each token (bool, V) whether it may come next; a stop token may where the JSON is whole."""
        import torch

        allowed_V = torch.zeros(vocabulary, dtype=torch.bool)
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[:vocabulary]
        allowed_V[: len(mask)] = mask != 0
        whole = self._matcher.is_accepting()
        for token_id in self._stop_token_ids:
            if token_id < vocabulary:
                allowed_V[token_id] = whole
        return allowed_V

    def accept(self, token_id: int) -> bool:
        """Moves on by a token that was allowed; returns whether nothing can follow it."""
        self._matcher.consume_token(token_id)
        return self._matcher.is_stopped() and not self._matcher.is_error()


class GrammarCompiler:
    """Makes matchers for one tokenizer, which is read when the first is asked for (0.8 s with a vocabulary of 49k)."""

    def __init__(self, base_dir: Path) -> None:
        self._base_dir = base_dir
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()  # of `_tokenizer`

    def compile(self, grammar: Grammar, stop_token_ids: AbstractSet[int]) -> Matcher:
        """May be called from several threads. Raises BadRequest where a schema is too large to compile."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _read_tokenizer(self._base_dir)
        matcher = _matcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise _refusal(matcher.get_error(), grammar.field)
        return Matcher(matcher, grammar.field, stop_token_ids)


def check_grammar(grammar: Grammar) -> None:
    """Raises BadRequest where the schema is none, asks for what cannot be held, or has no end.

    It needs no model's tokenizer: what bytes can hold, any tokens can. The schemas that a Lark grammar holds are to be
    checked before, by `check_grammars`.
    """
    most = MAX_LARK_CHARACTERS if grammar.syntax is Syntax.LARK else MAX_SCHEMA_CHARACTERS
    if len(grammar.text) > most:
        raise _refusal(f"it has {len(grammar.text)} characters, and {most} are allowed", grammar.field)
    joins = 0 if grammar.syntax is Syntax.LARK else _joins(grammar)
    if joins > MAX_JOINS:
        reason = f"it joins schemas {joins} times, by allOf or beside a $ref, and {MAX_JOINS} are allowed"
        raise _refusal(reason, grammar.field)
    matcher = _matcher(_byte_tokenizer(), grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()  # only this finds a schema that refers to itself for ever
    if matcher.is_error():
        raise _refusal(matcher.get_error(), grammar.field)


def check_grammars(grammars: Sequence[Grammar], field: str) -> None:
    """Checks schemas one by one; raises BadRequest, naming `field`, where all together would take too long."""
    characters, joins = sum(len(grammar.text) for grammar in grammars), sum(map(_joins, grammars))
    if characters > MAX_LARK_CHARACTERS:
        reason = f"the schemas have {characters} characters together, and {MAX_LARK_CHARACTERS} are allowed"
        raise _refusal(reason, field)
    if joins > MAX_JOINS:
        reason = f"schemas are joined {joins} times, by allOf or beside a $ref, and {MAX_JOINS} are allowed together"
        raise _refusal(reason, field)
    for grammar in grammars:
        check_grammar(grammar)


def _refusal(reason: str, field: str) -> BadRequest:
    line = " ".join(reason.replace("<non-verbose/>", "").split())
    short = line if len(line) <= MAX_REASON_CHARACTERS else line[:MAX_REASON_CHARACTERS] + "..."
    return BadRequest(
        f"{field} cannot be followed: {short}; change or simplify it", param=field, code="unusable_schema"
    )


def _joins(grammar: Grammar) -> int:
    """Counts how often two schemas have to hold at once."""
    try:
        nodes: list[Any] = [json.loads(grammar.text)]
    except (ValueError, RecursionError) as error:
        raise _refusal(f"it is not JSON: {error}", grammar.field) from error
    joins = 0
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            parts = node["allOf"] if isinstance(node.get("allOf"), list) else []
            joins += max(len(parts) - 1, 0) + ("pattern" in node and ("$ref" in node or bool(parts)))
        nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return joins


def _matcher(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    read = LLMatcher.grammar_from_lark if grammar.syntax is Syntax.LARK else LLMatcher.grammar_from_json_schema
    try:
        source = read(grammar.text)
    except ValueError as error:
        raise _refusal(str(error), grammar.field) from error
    limits = LLParserLimits(verbose_errors=False)  # the verbose ones print the schema, and the text so far
    return LLMatcher(tokenizer, source, log_level=0, limits=limits)


@functools.cache
def _byte_tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _read_tokenizer(base_dir: Path) -> LLTokenizer:
    from llguidance.hf import from_tokenizer
    from transformers import AutoConfig, AutoTokenizer

    from training.chat import end_of_turn_id

    tokenizer: Any = AutoTokenizer.from_pretrained(base_dir, local_files_only=True)
    vocabulary = int(AutoConfig.from_pretrained(base_dir, local_files_only=True).vocab_size)
    return from_tokenizer(tokenizer, max(vocabulary, len(tokenizer)), end_of_turn_id(tokenizer))
