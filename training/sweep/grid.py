"""The grid of a sweep: fields of the recipe with several values each, and every combination of them as a recipe."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from training.config import ConfigError, TrainConfig, load_recipe

_NAME_CHARACTERS = 64  # as many as run.name may have
_FIXED = {
    "run.name": "each run is named by its values",
    "model.dtype": "one process computes in one dtype; make a sweep for each",
}


@dataclass(frozen=True, slots=True)
class Axis:
    """A field, such as lora.rank, and its values as they were written."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One combination: `values` by field, and the recipe it makes."""

    values: dict[str, str]
    config: TrainConfig

    @property
    def label(self) -> str:
        return "  ".join(f"{field}={value}" for field, value in self.values.items())


def parse_axes(words: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """Returns the fields of `--section.key a,b,c` words with several values, and the words of those with one.

    A comma inside brackets or quotes belongs to a value: `all-linear,["q_proj","v_proj"]` are two. Raises ConfigError.
    """
    axes, single = list[Axis](), list[str]()
    left = list(words)
    while left:
        word, equals, text = left.pop(0).partition("=")
        if not equals and left and not left[0].startswith("--"):
            text = left.pop(0)
        values = split_values(text)
        if len(values) < 2:
            single += [word, text] if text else [word]
            continue
        if (field := word.removeprefix("--")) in _FIXED:
            raise ConfigError(f"{word} {text}: no field to sweep: {_FIXED[field]}")
        if any(axis.field == field for axis in axes):
            raise ConfigError(f"{word} is given twice; put all its values into one list")
        axes.append(Axis(field, tuple(values)))
    if not axes:
        raise ConfigError("nothing to sweep: give a field several values, such as --lora.rank 4,8,16")
    return axes, single


def split_values(text: str) -> list[str]:
    """Returns the values between the commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def points(recipe: str, axes: Sequence[Axis], single: Sequence[str]) -> list[Point]:
    """Returns every combination. Raises ConfigError where one is no recipe, two are the same, or none is measured."""
    found = list(_points(recipe, axes, single))
    first = found[0].config
    if not (first.run.eval_rows and first.data.held_out):
        raise ConfigError(
            f"a sweep compares held-out NLLs, but data.held_out = {first.data.held_out} and "
            f"run.eval_rows = {first.run.eval_rows}; raise both above 0"
        )
    same = Counter(point.config.model_copy(update={"run": _nameless(point)}).model_dump_json() for point in found)
    if max(same.values()) > 1:
        raise ConfigError("two combinations make the same recipe: does a value stand twice, such as 1e-4 and 0.0001?")
    return found


def _points(recipe: str, axes: Sequence[Axis], single: Sequence[str]) -> Iterator[Point]:
    for chosen in product(*(axis.values for axis in axes)):
        values = {axis.field: value for axis, value in zip(axes, chosen, strict=True)}
        words = [word for field, value in values.items() for word in (f"--{field}", value)]
        yield Point(values, load_recipe(recipe, [*single, *words, "--run.name", _name(values)]))


def _nameless(point: Point) -> object:
    return point.config.run.model_copy(update={"name": "sweep"})


def _name(values: dict[str, str]) -> str:
    """A run's name, which is its folder too: short, and the same whatever other values the sweep has."""
    parts = [
        f"{field.partition('.')[2]}-{re.sub(r'[^A-Za-z0-9.]+', '-', value).strip('-')}"
        for field, value in values.items()
    ]
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]
    return "_".join(parts)[: _NAME_CHARACTERS - 9].rstrip("-_") + f"-{digest}"
