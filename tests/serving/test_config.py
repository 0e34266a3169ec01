"""Flags win over the environment; a wrong one is named with its value and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from serving.config import ConfigError, read_config


@pytest.fixture
def base(tmp_path) -> str:
    return str(tmp_path)


def test_defaults(base):
    config = read_config(["--base", base], {})
    assert (config.base, config.base_name, config.host, config.port) == (Path(base), "base", "127.0.0.1", 8000)
    assert (config.engine, config.max_batch, config.max_queue) == ("auto", 32, 256)
    assert (config.context_length, config.body_limit_mib, config.drain_s) == (None, 4, 30)
    assert config.cache_gib is None
    assert (config.keys, config.deadline_s, config.stall_s) == (None, 600, 60)


def test_flags_win_over_the_environment(base):
    environment = {
        "GRAFT_BASE": base,
        "GRAFT_PORT": "9000",
        "GRAFT_MAX_BATCH": "8",
        "GRAFT_CACHE_GIB": "1.5",
        "GRAFT_KEYS": "keys.toml",
        "GRAFT_DEADLINE_S": "30",
        "GRAFT_ADAPTER": f"a={base},b={base}",
    }
    config = read_config(["--port", "9001", "--stall-s", "2.5"], environment)
    assert (config.keys, config.deadline_s, config.stall_s) == (Path("keys.toml"), 30, 2.5)
    assert (config.port, config.max_batch, config.cache_gib) == (9001, 8, 1.5)
    assert config.adapters == {"a": Path(base), "b": Path(base)}


def test_adapters_and_merged_repeat(base):
    config = read_config(
        ["--base", base, "--adapter", f"a={base}", "--adapter", f"b={base}", "--merged", f"c={base}"], {}
    )
    assert (list(config.adapters), list(config.merged)) == (["a", "b"], ["c"])


def test_the_registry_is_configured(base):
    config = read_config(["--base", base], {})
    assert (config.state, config.adapter_roots, config.max_adapters, config.max_rank) == (None, (), 16, None)
    words = ["--state", f"{base}/state", "--adapter-root", base, "--max-adapters", "4", "--max-rank", "64"]
    config = read_config(["--base", base, *words], {})
    assert (config.state, config.adapter_roots) == (Path(base) / "state", (Path(base),))
    assert (config.max_adapters, config.max_rank) == (4, 64)
    assert read_config(["--base", base], {"GRAFT_ADAPTER_ROOT": f"{base},{base}"}).adapter_roots == (Path(base),) * 2
    with pytest.raises(ConfigError, match="--adapter-root 0: /nowhere is no directory"):
        read_config(["--base", base, "--adapter-root", "/nowhere"], {})


@pytest.mark.parametrize("name", ["auto", "vllm", "transformers", "fake"])
def test_every_engine_can_be_asked_for(base, name):
    assert read_config(["--base", base, "--engine", name], {}).engine == name


def test_the_collector_has_opentelemetrys_own_variable_too(base):
    standard = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://standard:4318"}
    assert read_config(["--base", base], {}).otlp_endpoint is None
    assert read_config(["--base", base], {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}).otlp_endpoint is None
    assert read_config(["--base", base], standard).otlp_endpoint == "http://standard:4318"
    own = {**standard, "GRAFT_OTLP_ENDPOINT": "http://own:4318"}
    assert read_config(["--base", base], own).otlp_endpoint == "http://own:4318"
    assert read_config(["--base", base, "--otlp-endpoint", "http://flag:1"], own).otlp_endpoint == "http://flag:1"


def test_it_is_frozen(base):
    with pytest.raises(ValidationError, match="frozen"):
        read_config(["--base", base], {}).port = 1


WRONG = [
    ([], "--base is required; give it, or set GRAFT_BASE"),
    (["--base", "/nowhere"], "--base /nowhere is no directory"),
    (["--base", "{base}", "--adapter", "a"], "--adapter a: is not NAME=DIR"),
    (["--base", "{base}", "--adapter", "a=/nowhere"], "--adapter a: /nowhere is no directory"),
    (["--base", "{base}", "--adapter", "a@b={base}"], "a@b is no model name"),
    (["--base", "{base}", "--adapter", "a={base}", "--adapter", "a={base}"], "'a' is given twice"),
    (["--base", "{base}", "--adapter", "base={base}"], "'base' names 2 models"),
    (["--base", "{base}", "--adapter", "m={base}", "--merged", "m={base}"], "'m' names 2 models"),
    (["--base", "{base}", "--base-name", ""], "is no model name"),
    (["--base", "{base}", "--port", "70000"], "--port 70000"),
    (["--base", "{base}", "--port", "web"], "--port web"),
    (["--base", "{base}", "--engine", "tpu"], "--engine tpu"),
    (["--base", "{base}", "--weights", "int4"], "--weights int4 Input should be 'plain', 'nf4' or 'fp16'"),
    (["--base", "{base}", "--max-batch", "0"], "--max-batch 0"),
    (["--base", "{base}", "--context-length", "1"], "--context-length 1"),
    (["--base", "{base}", "--body-limit-mib", "nan"], "--body-limit-mib nan"),
    (["--base", "{base}", "--cache-gib", "0"], "--cache-gib 0"),
    (["--base", "{base}", "--cache-gib", "inf"], "--cache-gib inf"),
    (["--base", "{base}", "--drain-s", "-1"], "--drain-s -1"),
    (["--base", "{base}", "--deadline-s", "0"], "--deadline-s 0"),
    (["--base", "{base}", "--stall-s", "inf"], "--stall-s inf"),
    (["--base", "{base}", "--log-level", "loud"], "--log-level loud"),
    (["--base", "{base}", "--otlp-endpoint", "collector:4318"], "--otlp-endpoint collector:4318 is no URL"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_flag_is_named(base, arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_config([argument.replace("{base}", base) for argument in arguments], {})


def test_all_wrong_flags_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        read_config(["--base", "/nowhere", "--port", "web"], {})
    assert "--base" in str(caught.value)
    assert "--port" in str(caught.value)
