"""The tokenization: the ids that a completion of the same prompt or messages would read."""

from __future__ import annotations

from serving.messages import render
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel
from serving.sampling import refuse_oversized
from serving.tokenize.protocol import TokenizeRequest, TokenizeResponse
from serving.tools.call_format import call_format
from serving.tools.turns import texts_of


def tokenize(body: TokenizeRequest, model: ServedModel, base: LoadedBase, context_length: int) -> TokenizeResponse:
    """Raises BadRequest, or ContextTooLong for what no request of this context could carry."""
    if body.messages is not None:
        refuse_oversized(texts_of(body.messages), base.vocabulary, context_length, "messages")
        if body.tools:
            call_format(base, model, "tools")
        ids = render(body.messages, base, model, generation_prompt=body.add_generation_prompt, tools=body.tools)
    else:
        refuse_oversized([body.prompt or ""], base.vocabulary, context_length, "prompt")
        ids = tuple(base.tokenizer.encode(body.prompt))
    return TokenizeResponse(tokens=list(ids), count=len(ids), max_model_len=context_length)
