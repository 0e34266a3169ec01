"""The documents keep their word: what they tell to run exists, and what they link to is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from training.config import RECIPES, load_recipe

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/RESULTS.md", ROOT / "deploy/README.md"]
MODULES = ("training", "serving", "evalharness")
OURS = (*MODULES, "benchmarks")
WITH_COMMANDS = ("training", "evalharness", "serving.keys")


def commands() -> list[tuple[str, str]]:
    """Every shell line of every document, as (document, line); continued lines are joined."""
    found = []
    for document in DOCUMENTS:
        language = None  # of the fenced block that is open
        for line in document.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            if line.startswith("```"):
                language = line[3:].strip() or "none" if language is None else None
            elif language in ("sh", "none") and line.strip():
                found.append((document.name, line.strip()))
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_make_targets_that_documents_name_exist():
    named = {target for _, line in commands() for target in re.findall(r"\bmake ((?:[a-z][a-z-]* ?)+)", line)}
    words = {word for phrase in named for word in phrase.split()}
    assert {"train", "deploy", "eval", "loadtest", "stop", "test"} <= words
    assert words <= make_targets()


def test_every_make_target_has_a_line_of_help():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"make ([a-z-]+)", shown)) == make_targets()


def flags_named() -> list[tuple[str, str, str]]:
    found = []
    for _, line in commands():
        match = re.search(r"python -m (\w+(?:\.\w+)?)\s*(.*)", line)
        if match and match[1].partition(".")[0] in OURS:
            words = match[2].split()
            command = words[0] if words and match[1] in WITH_COMMANDS else ""
            found += [(match[1], command, word.split("=")[0]) for word in words if word.startswith("--")]
    return [(module, command, flag) for module, command, flag in found if "." not in flag]  # recipe fields


@pytest.mark.slow
def test_the_flags_that_documents_name_exist():
    wanted = flags_named()
    assert wanted
    for module, command in {(module, command) for module, command, _ in wanted}:
        words = [sys.executable, "-m", module, *([command] if command else []), "--help"]
        text = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for flag in {flag for m, c, flag in wanted if (m, c) == (module, command)}:
            assert flag in text, f"{module} {command} has no {flag}"


def test_links_and_paths_lead_somewhere():
    seen = 0
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                seen += 1
                assert (document.parent / target).exists(), f"{document.name}: {target}"
    assert seen


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe: Path):
    assert load_recipe(recipe.stem).run.name


def test_the_seeds_numbers_stand_in_its_recipe():
    recipe = load_recipe("qwen2-7b-alpaca")
    assert (recipe.model.id, recipe.data.dataset) == ("Qwen/Qwen2-7B-Instruct", "llamafactory/alpaca_gpt4_en")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (8, 16, 0.05)
    assert (recipe.data.cutoff, recipe.optim.batch_size, recipe.optim.epochs) == (1024, 16, 3)
    assert (recipe.optim.learning_rate, recipe.optim.schedule, recipe.optim.warmup_ratio) == (5e-5, "cosine", 0.03)
    assert (recipe.run.log_every, recipe.run.save_every, recipe.model.dtype) == (10, 100, "float16")


def test_no_document_names_a_machines_path_or_a_registry():
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert not re.search(r"/(root|home|work|tmp)/|pypi\.org|pythonhosted|huggingface\.co/", text), document
