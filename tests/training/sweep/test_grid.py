"""Properties of a grid: what is several values and what is one, and that no two runs are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.recipes import small_config
from training.config import ConfigError, resolved_toml
from training.sweep.grid import Axis, parse_axes, points, split_values


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(resolved_toml(small_config(tmp_path / "base", tmp_path)))
    return str(path)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("4,8, 16", ["4", "8", "16"]),
        ('["q_proj","v_proj"],all-linear', ['["q_proj","v_proj"]', "all-linear"]),
        ('["q_proj","v_proj"]', ['["q_proj","v_proj"]']),
        ("\"a, b\",'c,d'", ['"a, b"', "'c,d'"]),
        ("", [""]),
    ],
)
def test_commas_within_brackets_and_quotes_belong_to_a_value(text: str, values: list[str]):
    assert split_values(text) == values


def test_fields_with_one_value_are_plain_overrides():
    axes, single = parse_axes(
        ["--lora.rank", "4,8", "--optim.max_steps=2", "--data.strict", "--optim.learning_rate=1e-4,2e-4"]
    )
    assert axes == [Axis("lora.rank", ("4", "8")), Axis("optim.learning_rate", ("1e-4", "2e-4"))]
    assert single == ["--optim.max_steps", "2", "--data.strict"]


def test_every_combination_is_a_recipe_with_a_name_of_its_own(recipe: str):
    axes, single = parse_axes(
        ["--lora.rank", "4,8", "--lora.target_modules", '["q_proj","v_proj"],all-linear', "--optim.max_steps", "2"]
    )
    found = points(recipe, axes, single)
    assert [(p.config.lora.rank, p.config.lora.target_modules) for p in found] == [
        (4, ("q_proj", "v_proj")), (4, "all-linear"), (8, ("q_proj", "v_proj")), (8, "all-linear"),
    ]  # fmt: skip
    assert {p.config.optim.max_steps for p in found} == {2}
    assert len({p.config.run.name for p in found}) == 4
    assert found[1].config.run.name.startswith("rank-4_target_modules-all-linear-")
    assert found[1].label == "lora.rank=4  lora.target_modules=all-linear"


def test_a_runs_name_does_not_change_when_values_are_added(recipe: str):
    few = points(recipe, [Axis("lora.rank", ("4", "8"))], [])
    more = points(recipe, [Axis("lora.rank", ("2", "4", "8"))], [])
    assert [p.config.run.name for p in few] == [p.config.run.name for p in more[1:]]


def test_names_stay_short_and_different_whatever_the_values(recipe: str):
    long = '["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj"'
    axes = [Axis("lora.target_modules", (f"{long}]", f'{long},"down_proj"]')), Axis("lora.alpha", ("1", "1e1"))]
    names = {p.config.run.name for p in points(recipe, axes, [])}
    assert len(names) == 4
    assert max(map(len, names)) <= 64


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to sweep"),
        (["--lora.rank", "4"], "nothing to sweep"),
        (["--run.name", "a,b"], "each run is named by its values"),
        (["--model.dtype", "float32,bfloat16"], "one dtype"),
        (["--lora.rank", "4,8", "--lora.rank", "2,3"], "given twice"),
        (["--lora.rnk", "4,8"], "lora.rank"),
        (["--lora.rank", "4,0"], "lora.rank = 0"),
        (["--lora.rank", "4,"], "lora.rank = ''"),
        (["--optim.learning_rate", "1e-4,0.0001"], "the same recipe"),
        (["--lora.rank", "4,8", "--data.held_out", "0"], "data.held_out = 0"),
    ],
)
def test_what_is_no_sweep_is_refused_before_any_run(recipe: str, words: list[str], told: str):
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        points(recipe, *parse_axes(words))
