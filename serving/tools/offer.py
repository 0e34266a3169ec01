"""The offer: the functions that one reply may call, and how its model writes the calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.engine.engine import Grammar
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel
from serving.tools.call_format import CallFormat, call_format
from serving.tools.grammar import call_grammar
from serving.tools.parser import CallParser
from serving.tools.protocol import Tool, ToolChoice

AUTO = ToolChoice("auto")


@dataclass(frozen=True, slots=True)
class Offer:
    """`several` says whether one reply may make more than one call."""

    form: CallFormat
    tools: tuple[Tool, ...]
    choice: ToolChoice
    several: bool

    def parser(self) -> CallParser:
        names = frozenset(tool.function.name for tool in self.tools)
        return CallParser(self.form, names, several=self.several)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end the reply: nothing is to follow the only call."""
        free = self.choice.mode == "auto"
        return (self.form.closing,) if free and self.form.closing and not self.several else ()

    def grammar(self) -> Grammar | None:
        """Returns what holds the reply to the choice and to strict tools. Raises BadRequest for an unusable schema."""
        if not is_held(self.tools, self.choice):
            return None
        numbered = enumerate(tool.function for tool in self.tools)
        functions = [(place, each) for place, each in numbered if self.choice.name in (None, each.name)]
        return call_grammar(self.form, functions, several=self.several, free_text=self.choice.mode == "auto")


def is_held(tools: Sequence[Tool], choice: ToolChoice) -> bool:
    """Returns whether a grammar has to hold the reply; every tool's arguments fit its parameters then."""
    return choice.mode == "required" or any(tool.function.strict for tool in tools)


def make_offer(
    tools: Sequence[Tool], choice: ToolChoice, base: LoadedBase, model: ServedModel, *, parallel: bool
) -> Offer:
    """Raises UnsupportedField where the model's template renders no tools."""
    form = call_format(base, model, "tools")
    several = parallel and form.gap is not None and choice.name is None
    return Offer(form, tuple(tools), choice, several)
