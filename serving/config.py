"""The server's configuration: command-line flags over GRAFT_* environment defaults, checked and frozen."""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")


class ConfigError(ValueError):
    """Flags or variables that make no server; the message names the field, the value and the remedy."""


def _model_dir(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError("is no directory; give one that exists")
    return path


def _model_name(name: str) -> str:
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(
            "is no model name; use up to 100 letters, digits, '.', '_', '-' or '/', a letter or digit first"
        )
    return name


def _http_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise ValueError("is no URL of a collector; give one such as http://localhost:4318")
    return url


ModelDir = Annotated[Path, AfterValidator(_model_dir)]
ModelName = Annotated[str, AfterValidator(_model_name)]


class ServeConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    base: ModelDir
    base_name: ModelName = "base"
    adapters: Mapping[ModelName, ModelDir] = Field(default_factory=dict)
    merged: Mapping[ModelName, ModelDir] = Field(default_factory=dict)
    state: Path | None = None  # None: a temporary directory, which ends with the process
    adapter_roots: tuple[ModelDir, ...] = ()
    max_adapters: int = Field(16, ge=1)  # in the engine at once
    max_rank: int | None = Field(None, ge=1)  # None: the widest of what is known at the start, and at least 16
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    engine: Literal["auto", "vllm", "transformers", "fake"] = "auto"
    weights: Literal["plain", "nf4", "fp16"] = "plain"  # how the base is kept; merged models are plain
    max_batch: int = Field(32, ge=1)  # rows in a step
    max_queue: int = Field(256, ge=0)  # completions waiting for a row
    context_length: int | None = Field(None, ge=2)  # tokens; None: the model's, up to 8192
    cache_gib: float | None = Field(None, gt=0, allow_inf_nan=False)  # None: a share of the memory
    body_limit_mib: float = Field(4, gt=0, le=1024, allow_inf_nan=False)
    keys: Path | None = None  # None: inference is open, administration closed
    deadline_s: float = Field(600, gt=0, allow_inf_nan=False)  # from a request's arrival to the end of its answer
    stall_s: float = Field(60, gt=0, allow_inf_nan=False)  # work without a step for so long: not ready
    drain_s: int = Field(30, ge=0)  # how long running requests may finish after SIGTERM
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: Annotated[str, AfterValidator(_http_url)] | None = None  # None: no traces

    @model_validator(mode="after")
    def _names_differ(self) -> ServeConfig:
        names = Counter([self.base_name, *self.adapters, *self.merged])
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} names {names[twice[0]]} models; give each its own name")
        return self


# Flag, metavar, help. The environment variable of --max-batch is GRAFT_MAX_BATCH; a repeatable one takes commas.
_FLAGS: Sequence[tuple[str, str, str]] = (
    ("base", "DIR", "the base model's directory; required"),
    ("base-name", "NAME", "what requests call the base (base)"),
    ("adapter", "NAME=DIR", "an adapter to serve; repeat for more"),
    ("merged", "NAME=DIR", "a merged model to serve; repeat for more"),
    ("state", "DIR", "where revisions, labels and policies outlast the process (a temporary directory)"),
    ("adapter-root", "DIR", "a directory whose adapters an administrator may register; repeat for more"),
    ("max-adapters", "COUNT", "adapters that the engine holds at once (16)"),
    ("max-rank", "RANK", "largest rank of an adapter (the widest at the start, at least 16)"),
    ("host", "HOST", "address to listen on (127.0.0.1)"),
    ("port", "PORT", "port to listen on (8000)"),
    ("engine", "NAME", "auto, vllm, transformers or fake; auto: vLLM where it is installed and there is CUDA (auto)"),
    ("weights", "FORMAT", "keeps the base plain, in nf4 (as QLoRA trains it) or fp16 (faster on CPUs) (plain)"),
    ("max-batch", "ROWS", "sequences in one forward pass (32)"),
    ("max-queue", "COUNT", "completions that may wait for a row; more are answered 429 (256)"),
    ("context-length", "TOKENS", "prompt and completion together (the model's, up to 8192)"),
    ("cache-gib", "GIB", "largest key/value cache (a share of the memory)"),
    ("body-limit-mib", "MIB", "largest request body (4)"),
    ("keys", "FILE", "the key file; without one inference is open and administration closed"),
    ("deadline-s", "SECONDS", "longest time from a request to the end of its answer (600)"),
    ("stall-s", "SECONDS", "not ready once the engine has had work and made no step for so long (60)"),
    ("drain-s", "SECONDS", "how long running requests may finish after SIGTERM (30)"),
    ("log-level", "LEVEL", "debug, info, warning or error (info)"),
    ("otlp-endpoint", "URL", "an OpenTelemetry collector for traces, over HTTP (OTEL_EXPORTER_OTLP_ENDPOINT, or none)"),
)
STANDARD_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"  # OpenTelemetry's own name for it
_REPEATABLE = {"adapter": "adapters", "merged": "merged", "adapter-root": "adapter_roots"}
_NAMED = {"adapter", "merged"}  # of NAME=DIR


def read_config(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> ServeConfig:
    """Reads the flags, and for those absent the environment; raises ConfigError."""
    environment = os.environ if environment is None else environment
    flags = vars(_parser().parse_args(arguments))
    values: dict[str, Any] = {}
    for flag, _, _ in _FLAGS:
        variable = "GRAFT_" + flag.upper().replace("-", "_")
        value = flags[flag.replace("-", "_")]
        if value is None and environment.get(variable):
            value = environment[variable].split(",") if flag in _REPEATABLE else environment[variable]
        if value is not None and flag in _REPEATABLE:
            values[_REPEATABLE[flag]] = _named_dirs(flag, value) if flag in _NAMED else value
        elif value is not None:
            values[flag.replace("-", "_")] = value
    if STANDARD_ENDPOINT in environment:
        values.setdefault("otlp_endpoint", environment[STANDARD_ENDPOINT] or None)
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(each) for each in error.errors())) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving",
        description="Serves a base model, its adapters and merged models behind one OpenAI-compatible API.",
        epilog="Every flag has an environment default: --max-batch is GRAFT_MAX_BATCH, and so on.",
    )
    for flag, metavar, text in _FLAGS:
        action = "append" if flag in _REPEATABLE else "store"
        parser.add_argument(f"--{flag}", metavar=metavar, help=text, action=action)
    return parser


def _named_dirs(flag: str, entries: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, directory = entry.partition("=")
        if not (name and equals and directory):
            raise ConfigError(f"--{flag} {entry}: is not NAME=DIR, for example --{flag} starter=runs/starter/adapter")
        if name in found:
            raise ConfigError(f"--{flag} {entry}: {name!r} is given twice; give each its own name")
        found[name] = directory
    return found


def _sentence(error: Any) -> str:
    location = [str(part) for part in error["loc"] if part != "[key]"]
    if not location:
        return str(error["msg"]).removeprefix("Value error, ")
    singular = {field: flag for flag, field in _REPEATABLE.items()}
    flag = "--" + singular.get(location[0], location[0]).replace("_", "-")
    if error["type"] == "missing":
        return f"{flag} is required; give it, or set GRAFT_{location[0].upper()}"
    name = f" {location[1]}:" if len(location) > 1 else ""
    return f"{flag}{name} {error['input']} {str(error['msg']).removeprefix('Value error, ')}"
