"""The recipe: a TOML file and command-line overrides, read once into one frozen TrainConfig."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from training.errors import TrainingError
from training.fields import UNSET, allowed, options, suggest, wants_text
from training.llamafactory import SUFFIXES, read_llamafactory

RECIPES = Path(__file__).parent / "recipes"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ConfigError(TrainingError):
    """A recipe or an override that cannot be used: names the field, what was given and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    id: str = Field(min_length=1, description="hub id, local directory, or embedded:smollm2-135m-instruct")
    revision: str | None = Field(default=None, min_length=1, description="hub branch, tag or commit; unset: the newest")
    quantisation: Literal["nf4", "none"] = Field(
        default="nf4", description="of the frozen base: NF4 with double quantisation, or plain weights"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="of the arithmetic; auto: float32 on CPU, bfloat16 from Ampere on, else float16"
    )


class DataConfig(_Section):
    dataset: str = Field(
        min_length=1,
        description="hub id, local .json/.jsonl/.parquet file, `starter`, or a name in dataset_info",
    )
    dataset_info: Annotated[Path, Field(strict=False)] | None = Field(
        default=None, description="a LLaMA-Factory dataset_info.json, in which `dataset` is then a name"
    )
    split: str = Field(default="train", min_length=1, description="of a hub data set")
    format: Literal["auto", "alpaca", "sharegpt", "openai"] = Field(
        default="auto", description="of the rows; auto: by the first row's keys"
    )
    limit: int | None = Field(default=None, ge=1, description="rows read at most, from the start; unset: all")
    held_out: int = Field(default=100, ge=0, le=100_000, description="rows kept out of training for the evaluation")
    template: Literal["model", "qwen"] = Field(
        default="model", description="the model's own chat template, or LLaMA-Factory's way with Qwen's"
    )
    turns: Literal["all", "last"] = Field(default="all", description="of a chat, whose replies are trained")
    cutoff: int = Field(default=1024, ge=16, le=1_048_576, description="tokens a row at most; more is cut and counted")
    strict: bool = Field(default=False, description="whether a bad row ends the run; else it is left out and reported")
    leakage: Literal["drop", "report", "fail"] = Field(
        default="drop", description="what becomes of training rows that repeat a held-out row, exactly or nearly"
    )


class LoraConfig(_Section):
    rank: int = Field(default=8, ge=1, le=1024, description="of the update")
    alpha: float = Field(default=16.0, gt=0, le=65_536, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of LoRA's inputs zeroed while training")
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        default="all-linear", description="all-linear (without lm_head), or a list of module name suffixes"
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead")
    dora: bool = Field(default=False, description="learn rows' lengths too (DoRA); servers refuse it unless merged")


class OptimConfig(_Section):
    learning_rate: float = Field(default=5e-5, gt=0, le=1, description="at the peak of the schedule")
    schedule: Literal["cosine", "constant", "linear"] = Field(default="cosine", description="after the warmup")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of all steps that raises the rate from 0")
    epochs: int = Field(default=3, ge=1, le=1000, description="passes over the training rows")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps at most; unset: by epochs alone")
    batch_size: int = Field(default=16, ge=1, le=65_536, description="rows an optimizer step, over all devices")
    micro_batch_tokens: int = Field(
        default=4096,
        ge=16,
        le=1_048_576,
        description="tokens packed in one forward pass on one device; at least cutoff",
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="decoupled (AdamW)")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6, description="gradients are scaled down to this 2-norm")
    optimizer: Literal["adamw", "paged_adamw_8bit"] = Field(
        default="adamw", description="paged_adamw_8bit needs a CUDA device"
    )
    neftune_alpha: float | None = Field(default=None, gt=0, le=1000, description="NEFTune's noise; unset: none")


class RunConfig(_Section):
    name: str = Field(pattern=_NAME, description="the model name under which the adapter is served; not `base`")
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="of LoRA's start, dropout and the row order")
    log_every: int = Field(default=10, ge=1, description="optimizer steps between progress lines; each is logged")
    save_every: int = Field(default=100, ge=1, description="optimizer steps between checkpoints")
    eval_every: int = Field(default=100, ge=1, description="optimizer steps between validation NLLs")
    eval_rows: int = Field(default=100, ge=0, description="held-out rows of a validation NLL at most; 0: none")
    keep_checkpoints: int = Field(default=2, ge=1, le=1000, description="newest checkpoints kept, beside the best")
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="validations without a lower NLL that end the run, its best kept; unset: none"
    )
    sample_prompts: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="prompts that the model answers greedily during training, into samples.md"
    )
    sample_every: int | None = Field(default=None, ge=1, description="steps between them; unset: at each validation")
    sample_tokens: int = Field(default=64, ge=1, le=4096, description="tokens of a sample at most")
    trackers: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="where else to log, by accelerate's names, such as tensorboard"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        default="auto", description="recompute activations to save memory; auto: when the device needs it"
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="the blocks, a minute or two at the start; auto: long 16-bit runs from Ampere on"
    )

    @model_validator(mode="after")
    def _name_is_free(self) -> RunConfig:
        if self.name == "base":
            raise ValueError("run.name = 'base' is the base model's own served name; choose another")
        return self


class TrainConfig(_Section):
    """All that decides a training run."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig

    @model_validator(mode="after")
    def _pack_holds_a_row(self) -> TrainConfig:
        if self.optim.micro_batch_tokens < self.data.cutoff:
            raise ValueError(
                f"optim.micro_batch_tokens = {self.optim.micro_batch_tokens} cannot hold one row of "
                f"data.cutoff = {self.data.cutoff} tokens; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _early_stopping_has_rows(self) -> TrainConfig:
        patience, rows, held_out = self.run.early_stopping_patience, self.run.eval_rows, self.data.held_out
        if patience and not (rows and held_out):
            raise ValueError(
                f"run.early_stopping_patience = {patience} needs held-out rows, but data.held_out = {held_out} "
                f"and run.eval_rows = {rows}; raise both above 0, or unset it"
            )
        return self


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
