"""Where a recipe's base model lies on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.config import ModelConfig
from training.embedded import PREFIX, ensure_embedded
from training.errors import TrainingError


class BaseError(TrainingError):
    """A base model that neither the disk nor the hub gives."""


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """Where a base model lies on disk, and what it is called."""

    directory: Path
    model_id: str
    revision: str | None


def resolve_base(model: ModelConfig, cache: Path, *, weights: bool = True) -> BaseFiles:
    """Returns the base's local directory: the embedded model, a local path, or a hub snapshot (downloaded if need be;
    without `weights`, only what describes the model).

    Raises BaseError where none of these gives one.
    """
    if model.id.startswith(PREFIX):
        return BaseFiles(ensure_embedded(model.id, cache), model.id, None)
    if Path(model.id).is_dir():
        return BaseFiles(Path(model.id), model.id, None)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab*"]
    patterns += ["*.safetensors"] if weights else []
    try:
        directory = snapshot_download(model.id, revision=model.revision, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
        raise BaseError(
            f"model.id = {model.id!r}: no such local directory, and the hub did not give it ({error}); "
            "check the name and the network, or give a directory with config.json and *.safetensors"
        ) from error
    return BaseFiles(Path(directory), model.id, Path(directory).name)
