"""Holds the arrows, the single homes and the size limits of the design."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("training", "serving", "evalharness")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
ALLOWED = {
    ("serving", "training.artifact"),
    ("serving", "training.chat"),
}
SINGLE_HOMES = {"vllm": 1, "bitsandbytes": 1, "locust": 1}
LAYERS = {  # inside serving: a file may import its own layer and those below
    "__main__": 6,
    "app": 5,
    "admin": 4,
    "chat_completions": 4,
    "completions": 4,
    "models": 4,
    "tokenize": 4,
    "answer": 3,  # what the resources share
    "fair_queue": 3,
    "gate": 3,
    "generation": 3,
    "limits": 3,
    "messages": 3,
    "metrics": 3,
    "middleware": 3,
    "openapi": 3,
    "respond": 3,
    "response_format": 3,
    "shadow": 3,
    "sampling": 3,
    "sse": 3,
    "tools": 3,
    "tracing": 3,
    "registry": 2,
    "engine": 2,
    "disconnect": 1,
    "auth": 1,
    "keys": 1,
    "shadow_log": 1,
    "version": 1,
    "usage": 1,
    "validation": 1,
    "wire": 1,
    "config": 0,
    "errors": 0,
    "logs": 0,
}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "misc.py", "common"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_sweep_finds_the_sources():
    assert len(SOURCES) > 20
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(FOLDERS)


def test_folders_import_each_other_only_along_the_arrows():
    for path in SOURCES:
        here = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            there = name.split(".")[0]
            if there in FOLDERS and there != here:
                target = ".".join(name.split(".")[:2])
                assert (here, target) in ALLOWED, f"{path} imports {name}"
            assert there not in {"tests", "benchmarks", "deploy"}, f"{path} imports {name}"


def test_heavy_packages_have_one_home():
    for package, homes in SINGLE_HOMES.items():
        users = [path for path in SOURCES if any(name.split(".")[0] == package for name in imports(path))]
        assert len(users) <= homes, f"{package} is imported in {users}"


def layer(path: Path) -> int:
    return LAYERS[path.relative_to(ROOT / "serving").parts[0].removesuffix(".py")]


def test_serving_layers_point_down():
    checked = 0
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] != "serving" or path == ROOT / "serving/__init__.py":
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "serving" and len(parts) > 1 and parts[1] in LAYERS:
                checked += 1
                assert LAYERS[parts[1]] <= layer(path), f"{path} imports {name}"
    assert checked > 10


def test_only_main_knows_which_engine_runs():
    engines = {"vllm_engine", "transformers_engine", "fake_engine"}
    for path in SOURCES:
        if path.name == "__main__.py" or path.relative_to(ROOT).parts[:2] == ("serving", "engine"):
            continue
        for name in imports(path):
            parts = name.split(".")
            assert not (parts[:2] == ["serving", "engine"] and engines & set(parts)), f"{path} imports {name}"


def test_no_two_modules_import_each_other():
    edges: dict[str, set[str]] = {}
    modules = {module_of(path) for path in SOURCES}
    for path in SOURCES:
        edges[module_of(path)] = {name for name in imports(path) if name in modules}
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"import cycle: {' -> '.join((*trail, module))}"
        if state.get(module) == 2:
            return
        state[module] = 1
        for other in sorted(edges[module] - {module}):
            visit(other, (*trail, module))
        state[module] = 2

    for module in sorted(edges):
        visit(module, ())


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_files_and_functions_stay_small(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert not FORBIDDEN_NAMES & set(path.parts)
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path}: the first line says what the file is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_the_environment_is_read_in_config_only():
    for path in SOURCES:
        if path.name not in {"config.py", "__main__.py"}:
            text = path.read_text(encoding="utf-8")
            assert "os.environ" not in text, path
            assert "getenv" not in text, path


def test_what_serving_imports_of_training_is_free_of_torch():
    code = "import sys, training.artifact, training.chat; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_tests_mirror_the_source():
    """A test file for a source file stands at the same place in tests/ and names it."""
    known = {path.relative_to(ROOT).with_name(f"test_{path.name}") for path in SOURCES}
    mirrored = [p for folder in FOLDERS for p in (ROOT / "tests" / folder).rglob("test_*.py")]
    assert mirrored
    for path in mirrored:
        assert path.relative_to(ROOT / "tests") in known, f"{path} mirrors no source file"
