"""The tokenization: the ids that a completion of the same prompt or messages would read."""

from __future__ import annotations

from serving.messages import render
from serving.registry.catalog import Catalog
from serving.sampling import refuse_oversized
from serving.tokenize.protocol import TokenizeRequest, TokenizeResponse


def tokenize(body: TokenizeRequest, catalog: Catalog, context_length: int) -> TokenizeResponse:
    """Raises ModelNotFound, BadRequest, or ContextTooLong for what no request of this context could carry."""
    model, base = catalog.resolve(body.model), catalog.base
    if body.messages is not None:
        contents = (message.content for message in body.messages)
        refuse_oversized(contents, base.vocabulary, context_length, "messages")
        ids = render(body.messages, base, model, generation_prompt=body.add_generation_prompt)
    else:
        refuse_oversized([body.prompt or ""], base.vocabulary, context_length, "prompt")
        ids = tuple(base.tokenizer.encode(body.prompt))
    return TokenizeResponse(tokens=list(ids), count=len(ids), max_model_len=context_length)
