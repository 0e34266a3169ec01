"""The tokenization: the ids that a completion of the same prompt or messages would read."""

from __future__ import annotations

from serving.messages import render
from serving.registry.catalog import Catalog
from serving.tokenize.protocol import TokenizeRequest, TokenizeResponse


def tokenize(body: TokenizeRequest, catalog: Catalog, context_length: int) -> TokenizeResponse:
    model = catalog.resolve(body.model)
    if body.messages is not None:
        ids = render(body.messages, catalog.base, model, generation_prompt=body.add_generation_prompt)
    else:
        ids = tuple(catalog.base.tokenizer.encode(body.prompt))
    return TokenizeResponse(tokens=list(ids), count=len(ids), max_model_len=context_length)
