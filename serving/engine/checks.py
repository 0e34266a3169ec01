"""The request checks: what no engine can run is refused before it reaches a step, where it would end every request."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from serving.engine.engine import GenerationRequest, Variant
from serving.errors import BadRequest, ContextTooLong, ModelNotFound


def check_sizes(base_dir: Path, max_batch: int, context_length: int | None) -> int:
    """Returns the context in tokens, the model's own for None; raises ValueError for a size that cannot run."""
    if max_batch < 1:
        raise ValueError(f"max_batch {max_batch}: at least 1 row must run")
    longest = int(AutoConfig.from_pretrained(base_dir).max_position_embeddings)
    if context_length is not None and not 1 <= context_length <= longest:
        raise ValueError(f"context_length {context_length}: {base_dir} allows 1 to {longest}")
    return context_length or longest


def check_request(request: GenerationRequest, *, vocabulary: int, context_length: int) -> None:
    """Raises BadRequest or ContextTooLong; a prompt alone (max_tokens 0) may fill the whole context."""
    prompt, max_tokens = request.prompt_ids, request.sampling.max_tokens
    if max_tokens < 0:
        raise BadRequest(f"max_tokens {max_tokens}: give 0 or more", param="max_tokens")
    if not prompt:
        raise BadRequest("the prompt has no tokens; give at least one", param="prompt")
    wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise BadRequest(f"prompt token id {wrong}: this model has 0 to {vocabulary - 1}", param="prompt")
    if len(prompt) + min(max_tokens, 1) > context_length:
        raise ContextTooLong(
            f"the prompt has {len(prompt)} tokens and leaves none of the context of {context_length} for a "
            "completion; shorten it",
            param="prompt",
        )


def not_loaded(variant: Variant) -> ModelNotFound:
    return ModelNotFound(f"model {variant.name!r} is not loaded in the engine; add it first", param="model")
