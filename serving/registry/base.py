"""The loaded base: what a model directory's files say, all but its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.engine.engine import WeightFormat
from serving.engine.vocabulary import Vocabulary, VocabularyError, read_vocabulary
from serving.errors import ModelRejected
from training.artifact import ArtifactError, fingerprint_base
from training.chat import TemplateError, end_of_turn_id, template_hash

DEFAULT_CONTEXT_TOKENS = 8192  # a cache row of a longer context costs gigabytes; ask for more with --context-length


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """`weights` is the format that the engine keeps them in."""

    directory: Path
    tokenizer: Any
    vocabulary: Vocabulary
    fingerprint: str
    template_sha256: str
    stop_token_ids: frozenset[int]
    max_context_tokens: int
    created: int  # seconds since 1970
    weights: WeightFormat = WeightFormat.PLAIN

    def context_length(self, asked: int | None) -> int:
        """Returns the tokens a request may use; raises ModelRejected where more is asked than the model has."""
        if asked is not None and asked > self.max_context_tokens:
            raise ModelRejected(
                f"context length {asked} is more than the model's {self.max_context_tokens}; give at most that",
                param="context_length",
            )
        return asked or min(self.max_context_tokens, DEFAULT_CONTEXT_TOKENS)


def load_base(directory: Path, weights: WeightFormat = WeightFormat.PLAIN) -> LoadedBase:
    """Reads a model directory; raises ModelRejected where it has no weights, tokenizer, template or context size."""
    try:
        fingerprint = fingerprint_base(directory)
        tokenizer = load_tokenizer(directory)
        vocabulary = read_vocabulary(tokenizer)
        stops = end_of_turn_ids(directory, tokenizer)
        return LoadedBase(
            directory=directory,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            fingerprint=fingerprint,
            template_sha256=template_hash(tokenizer),
            stop_token_ids=stops,
            max_context_tokens=_context_tokens(directory),
            created=int((directory / "config.json").stat().st_mtime),
            weights=weights,
        )
    except (ArtifactError, VocabularyError, TemplateError, OSError, ValueError) as error:
        raise ModelRejected(f"base model {directory} cannot be served: {error}") from error


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def end_of_turn_ids(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Returns the template's end-of-turn id and what generation_config.json ends at."""
    path = directory / "generation_config.json"
    eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return frozenset({end_of_turn_id(tokenizer), *listed})


def _context_tokens(directory: Path) -> int:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tokens = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"config.json: max_position_embeddings is {tokens!r}; it has to be the context in tokens")
    return tokens
