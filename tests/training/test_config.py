"""Properties of recipes: each field settable, each mistake named, the resolved file read back the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training.config import RECIPES, ConfigError, TrainConfig, cache_dir, load_recipe, no_color, resolved_toml

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
SMALLEST = "[model]\nid = 'm'\n[data]\ndataset = 'd'\ncutoff = 64\n[run]\nname = 'n'\n"


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_recipes_are_found():
    assert {"smollm2-starter", "qwen2-7b-alpaca"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_and_survives_being_resolved(name: str, tmp_path: Path):
    config = load_recipe(name)
    assert load_recipe(RECIPES / f"{name}.toml") == config
    assert load_recipe(recipe(tmp_path, resolved_toml(config))) == config


def test_the_qwen_recipe_has_the_numbers_it_is_known_for():
    config = load_recipe("qwen2-7b-alpaca")
    assert (config.model.id, config.model.quantisation) == ("Qwen/Qwen2-7B-Instruct", "nf4")
    assert (config.data.dataset, config.data.template) == ("llamafactory/alpaca_gpt4_en", "qwen")
    assert (config.data.cutoff, config.data.held_out) == (1024, 100)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16, 0.05)
    assert config.lora.target_modules == "all-linear"
    assert (config.optim.learning_rate, config.optim.schedule, config.optim.warmup_ratio) == (5e-5, "cosine", 0.03)
    assert (config.optim.epochs, config.optim.batch_size) == (3, 16)
    assert (config.run.log_every, config.run.save_every) == (10, 100)


def test_every_field_says_what_it_is():
    fields = [
        (section, name, field)
        for section, info in TrainConfig.model_fields.items()
        for name, field in info.annotation.model_fields.items()
    ]
    assert len(fields) > 30
    assert [f"{section}.{name}" for section, name, field in fields if not field.description] == []


@pytest.mark.parametrize(
    ("words", "section", "field", "value"),
    [
        (["--lora.rank", "4"], "lora", "rank", 4),
        (["--lora.rank=4"], "lora", "rank", 4),
        (["--lora.alpha", "8"], "lora", "alpha", 8.0),
        (["--optim.learning_rate", "2e-4"], "optim", "learning_rate", 2e-4),
        (["--lora.target_modules", '["q_proj", "v_proj"]'], "lora", "target_modules", ("q_proj", "v_proj")),
        (["--lora.target_modules", "all-linear"], "lora", "target_modules", "all-linear"),
        (["--data.strict", "true"], "data", "strict", True),
        (["--data.strict"], "data", "strict", True),
        (["--data.strict", "--lora.rank", "4"], "data", "strict", True),
        (["--model.revision", "1234567"], "model", "revision", "1234567"),
        (["--model.revision", "1e5"], "model", "revision", "1e5"),
        (["--model.id", "./models/it's"], "model", "id", "./models/it's"),
        (["--model.id", '"quoted"'], "model", "id", "quoted"),
        (["--data.dataset", "true"], "data", "dataset", "true"),
        (["--data.dataset_info", "7"], "data", "dataset_info", Path("7")),
        (["--data.limit", "5", "--data.limit", "none"], "data", "limit", None),
        (["--model.quantisation", "none"], "model", "quantisation", "none"),
        (["--optim.max_steps", "3"], "optim", "max_steps", 3),
        (["--optim.neftune_alpha", "5"], "optim", "neftune_alpha", 5.0),
        (["--run.early_stopping_patience", "3"], "run", "early_stopping_patience", 3),
        (["--run.trackers", '["tensorboard"]'], "run", "trackers", ("tensorboard",)),
    ],
)
def test_an_override_sets_its_field_and_no_other(words: list[str], section: str, field: str, value: object):
    config = load_recipe("smollm2-starter", words)
    assert getattr(getattr(config, section), field) == value
    changed = load_recipe("smollm2-starter").model_dump()
    changed[section][field] = value
    if len(words) < 3:
        assert config.model_dump() == changed


def test_an_override_may_add_a_section(tmp_path: Path):
    assert load_recipe(recipe(tmp_path, SMALLEST), ["--lora.rank", "3"]).lora.rank == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lora.rnk", "4"], "did you mean lora.rank"),
        (["--lorra.rank", "4"], "did you mean lora.rank"),
        (["--rank", "4"], "unknown section"),
        (["--lora", "4"], "known: lora.rank"),
        (["lora.rank", "4"], "expected --section.key value"),
        (["--lora.rank"], "no value given"),
        (["--lora.rank", "--data.strict"], "no value given"),
        (["--lora.rank", "0"], "lora.rank = 0 is not allowed; give a whole number, >= 1, <= 1024"),
        (["--lora.rank", "-1"], "lora.rank = -1"),
        (["--lora.rank", "1.5"], "lora.rank = 1.5"),
        (["--lora.rank", "true"], "lora.rank = True"),
        (["--lora.rank", "many"], "lora.rank = 'many'"),
        (["--lora.dropout", "1"], "lora.dropout = 1 is not allowed; give a number, >= 0, < 1"),
        (["--lora.target_modules", "[]"], "lora.target_modules = []"),
        (["--lora.target_modules", "3"], "'all-linear' or a list of text"),
        (["--optim.learning_rate", "nan"], "optim.learning_rate = nan"),
        (["--optim.learning_rate", "inf"], "optim.learning_rate = inf"),
        (["--optim.schedule", "cos"], "'cosine' or 'constant' or 'linear'"),
        (["--optim.micro_batch_tokens", "100"], "cannot hold one row of data.cutoff = 512"),
        (["--run.name", "base"], "the base model's own served name"),
        (["--run.name", "a b"], "run.name = 'a b'"),
        (["--run.seed", "none"], "run.seed = 'none'"),
        (["--optim.neftune_alpha", "0"], "optim.neftune_alpha = 0"),
        (["--run.early_stopping_patience", "0"], "run.early_stopping_patience = 0"),
        (["--run.early_stopping_patience", "2", "--run.eval_rows", "0"], "needs held-out rows"),
        (["--run.trackers", "tensorboard"], "a list of text"),
    ],
)
def test_a_bad_override_names_field_value_and_what_is_allowed(words: list[str], says: str):
    with pytest.raises(ConfigError) as caught:
        load_recipe("smollm2-starter", words)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "[model] is missing; [data] is missing; [run] is missing"),
        ("[model]\n", "model.id is missing; give text"),
        ("model = 3\n", "model: "),
        ("[modl]\nid = 'm'\n", "unknown section in 'modl'; did you mean model?"),
        ("sed = 3\n" + SMALLEST, "unknown section in 'sed'"),
        (SMALLEST + "sed = 3\n", "unknown key 'run.sed'; did you mean run.seed?"),
        (SMALLEST + "[lora]\nrank = '16'\n", "lora.rank = '16' is not allowed"),
        (SMALLEST + "[lora]\nrank = 0\nalpha = 0\n", "lora.alpha = 0"),
        ("[model\n", "not TOML"),
    ],
)
def test_a_bad_recipe_is_refused_by_file_and_field(tmp_path: Path, text: str, says: str):
    path = recipe(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not TOML"):
        load_recipe(path)


def test_an_unknown_recipe_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean smollm2-starter"):
        load_recipe("smolm2-starter")


def test_a_config_is_frozen():
    config = load_recipe("smollm2-starter")
    with pytest.raises(ValidationError, match="frozen"):
        config.lora.rank = 3


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_survives_being_resolved(tmp_path_factory: pytest.TempPathFactory, text: str):
    config = load_recipe("smollm2-starter")
    config = config.model_copy(update={"model": config.model.model_copy(update={"id": text})})
    path = recipe(tmp_path_factory.getbasetemp(), resolved_toml(config))
    assert load_recipe(path) == config


def test_the_cache_stands_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("GRAFT_CACHE")
    monkeypatch.chdir(tmp_path)
    assert cache_dir() == tmp_path / ".cache" / "graft"


def test_no_color_is_asked_for_by_any_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_COLOR", "0")
    assert no_color()
    monkeypatch.setenv("NO_COLOR", "")
    assert not no_color()
