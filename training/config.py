"""The recipe: a TOML file and command-line overrides, read once into one frozen TrainConfig."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from training.errors import TrainingError
from training.fields import UNSET, allowed, options, suggest, wants_text
from training.llamafactory import SUFFIXES, read_llamafactory
from training.sections import DataConfig as DataConfig  # noqa: PLC0414 - all these are part of what this file gives
from training.sections import LoraConfig as LoraConfig  # noqa: PLC0414
from training.sections import ModelConfig as ModelConfig  # noqa: PLC0414
from training.sections import OptimConfig as OptimConfig  # noqa: PLC0414
from training.sections import TrainConfig as TrainConfig  # noqa: PLC0414

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(TrainingError):
    """A recipe or an override that cannot be used: names the field, what was given and what is allowed."""


def cache_dir() -> Path:
    """Returns where converted models are kept: GRAFT_CACHE, or .cache/graft under the current folder."""
    return Path(os.environ.get("GRAFT_CACHE") or Path(".cache", "graft")).absolute()


def no_color() -> bool:
    """Returns whether the user asked for plain output, by NO_COLOR (any text but the empty one)."""
    return bool(os.environ.get("NO_COLOR"))


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Returns the recipe of a TOML file, a bare name in training/recipes/, or LLaMA-Factory's YAML or JSON form.

    `overrides` are `--section.key value` words.

    Raises ConfigError for an unknown recipe, section or key (with a suggestion) and for a value out of range.
    """
    path = _find(path_or_name)
    sections = read_llamafactory(path) if path.suffix in SUFFIXES else _read_toml(path)
    for dotted, value in _parse_overrides(overrides):
        section, key = _known(dotted)
        table = sections.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} = {table!r} must be a table, [{section}]")
        table[key] = value
    return _validate(sections, path)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def resolved_toml(config: TrainConfig) -> str:
    """Returns the recipe with every field that has a value; `load_recipe` reads it back to an equal config."""
    lines: list[str] = []
    for section, fields in config.model_dump(mode="json", exclude_none=True).items():
        lines += [f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in fields.items()), ""]
    return "\n".join(lines)


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    bare = RECIPES / f"{path_or_name}.toml"
    if path.is_file():
        return path
    if path.name == str(path_or_name) and bare.is_file():
        return bare
    names = sorted(found.stem for found in RECIPES.glob("*.toml"))
    raise ConfigError(
        f"no recipe {str(path_or_name)!r}: give a TOML file or a recipe's name{suggest(path.stem, names)}"
    )


def _parse_overrides(words: Sequence[str]) -> Iterable[tuple[str, Any]]:
    """Yields (dotted key, value) of `--a.b value` and `--a.b=value`; a flag such as `--data.strict` may stand alone."""
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"override {word!r}: expected --section.key value, such as --lora.rank 16")
        dotted, equals, text = word[2:].partition("=")
        field = _field(*_known(dotted))
        if not equals and left and not left[0].startswith("--"):
            text = left.pop(0)
        elif not equals and field.annotation is bool:
            text = "true"
        elif not equals:
            raise ConfigError(f"--{dotted}: no value given; it takes {allowed(field)}")
        yield dotted, _parse_value(text, field)


def _parse_value(text: str, field: FieldInfo) -> Any:
    """Reads a value by TOML's syntax; what is not TOML, and a number where text is wanted, is taken as it stands."""
    if text == UNSET and type(None) in options(field.annotation):
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if wants_text(field) and not isinstance(value, str) else value


def _known(dotted: str) -> tuple[str, str]:
    section, _, key = dotted.partition(".")
    sections = TrainConfig.model_fields
    if section not in sections:
        every = [f"{name}.{field}" for name in sections for field in _fields(name)]
        raise ConfigError(f"unknown section in {dotted!r}" + suggest(dotted, [*sections, *every]))
    if key not in _fields(section):
        raise ConfigError(f"unknown key {dotted!r}" + suggest(key, _fields(section), prefix=section + "."))
    return section, key


def _fields(section: str) -> Mapping[str, FieldInfo]:
    model = TrainConfig.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model.model_fields


def _field(section: str, key: str) -> FieldInfo:
    return _fields(section)[key]


def _validate(sections: Mapping[str, Any], path: Path) -> TrainConfig:
    for section, table in sections.items():
        keys = [f"{section}.{key}" for key in table] if isinstance(table, dict) else []
        for dotted in keys if section in TrainConfig.model_fields else [section]:
            try:
                _known(dotted)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
    try:
        return TrainConfig.model_validate(sections)
    except ValidationError as error:
        problems = dict.fromkeys(_problem(dict(detail)) for detail in error.errors())  # a union's branches repeat
        raise ConfigError(f"{path}: " + "; ".join(problems)) from None


def _problem(detail: dict[str, Any]) -> str:
    location, message = tuple(str(part) for part in detail["loc"]), detail["msg"].removeprefix("Value error, ")
    if location and detail["type"] == "missing" and len(location) == 1:
        return f"[{location[0]}] is missing"
    if len(location) < 2:
        return f"{location[0]}: {message}" if location and detail["type"] != "value_error" else message
    dotted, field = ".".join(location[:2]), _field(*location[:2])
    if detail["type"] == "missing":
        return f"{dotted} is missing; give {allowed(field)}"
    return f"{dotted} = {detail['input']!r} is not allowed; give {allowed(field)}"


def _toml_value(value: Any) -> str:
    # JSON's scalars and lists are TOML too, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
