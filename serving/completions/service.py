"""The text completion: from prompts to engine choices, and from their pieces to a response or its chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from serving.answer import Identity, identify
from serving.completions.logprobs import completion_logprobs, joined, no_logprobs, prompt_logprobs
from serving.completions.protocol import Completion, CompletionChoice, CompletionRequest, LegacyLogprobs, Prompt
from serving.engine.completion import Choice, Piece
from serving.engine.vocabulary import Vocabulary
from serving.errors import BadRequest
from serving.registry.base import LoadedBase
from serving.registry.catalog import ServedModel
from serving.sampling import choices_for, refuse_oversized, room_for
from serving.usage import Usage, usage_of

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """All that is decided before the engine is asked."""

    identity: Identity
    choices: tuple[Choice, ...]
    prompt_tokens: int
    echo: bool
    with_logprobs: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class _Gain:
    """What one choice's response gains by a piece, the echoed prompt included."""

    index: int
    text: str
    logprobs: LegacyLogprobs
    generated: int
    finish_reason: str | None


def plan_completion(
    body: CompletionRequest, model: ServedModel, base: LoadedBase, context_length: int
) -> CompletionPlan:
    """Raises ContextTooLong, or BadRequest for ids that are not in the vocabulary."""
    for prompt in body.prompt:
        if isinstance(prompt, str):
            refuse_oversized([prompt], base.vocabulary, context_length, "prompt")
    prompts = [encode_prompt(prompt, base, f"prompt[{at}]") for at, prompt in enumerate(body.prompt)]
    sized = [
        (ids, room_for(len(ids), body.max_tokens, DEFAULT_MAX_TOKENS, context_length, "prompt")) for ids in prompts
    ]
    identity = identify("cmpl", model)
    scored = body.logprobs if body.echo else None
    choices = choices_for(body, model, base.vocabulary, identity.id, sized, body.logprobs, scored)
    total = sum(map(len, prompts))
    return CompletionPlan(identity, choices, total, body.echo, body.logprobs is not None, body.include_usage)


def encode_prompt(prompt: Prompt, base: LoadedBase, param: str) -> tuple[int, ...]:
    """Returns a prompt's ids; a text is encoded as the tokenizer does by default, start token included."""
    if isinstance(prompt, str):
        ids = tuple(base.tokenizer.encode(prompt))
    else:
        ids = prompt
        wrong = next((token_id for token_id in ids if not 0 <= token_id < base.vocabulary.size), None)
        if wrong is not None:
            raise BadRequest(f"{param}: id {wrong} is not among 0 to {base.vocabulary.size - 1}", param=param)
    if not ids:
        raise BadRequest(f"{param} has no tokens, and nothing can follow nothing; give at least one", param=param)
    return ids


async def completion(plan: CompletionPlan, pieces: AsyncGenerator[Piece, None], vocabulary: Vocabulary) -> Completion:
    """Folds the pieces into the whole response."""
    gathered: list[list[_Gain]] = [[] for _ in plan.choices]
    async with aclosing(_gains(plan, pieces, vocabulary)) as gains:
        async for gain in gains:
            gathered[gain.index].append(gain)
    choices = [
        CompletionChoice(
            index=index,
            text="".join(gain.text for gain in own),
            logprobs=joined([gain.logprobs for gain in own]) if plan.with_logprobs else None,
            finish_reason=own[-1].finish_reason,
        )
        for index, own in enumerate(gathered)
    ]
    return _response(plan, choices, usage_of(plan.prompt_tokens, sum(own[-1].generated for own in gathered)))


async def chunks(
    plan: CompletionPlan, pieces: AsyncGenerator[Piece, None], vocabulary: Vocabulary
) -> AsyncGenerator[str, None]:
    """Yields the response as chunks, in JSON, and usage at the end if asked."""
    generated = dict.fromkeys(range(len(plan.choices)), 0)
    async with aclosing(_gains(plan, pieces, vocabulary)) as gains:
        async for gain in gains:
            generated[gain.index] = gain.generated
            if gain.text or gain.logprobs.tokens or gain.finish_reason:
                choice = CompletionChoice(
                    index=gain.index,
                    text=gain.text,
                    logprobs=gain.logprobs if plan.with_logprobs else None,
                    finish_reason=gain.finish_reason,
                )
                yield _json(plan, _response(plan, [choice], None))
    if plan.include_usage:
        yield _json(plan, _response(plan, [], usage_of(plan.prompt_tokens, sum(generated.values()))))


async def _gains(
    plan: CompletionPlan, pieces: AsyncGenerator[Piece, None], vocabulary: Vocabulary
) -> AsyncGenerator[_Gain, None]:
    """Puts the echoed prompt in front of each choice's first piece."""
    echoed: dict[int, str] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            first = plan.echo and piece.index not in echoed
            prompt_ids = plan.choices[piece.index].request.prompt_ids
            if first:
                echoed[piece.index] = vocabulary.spell(prompt_ids)
            logprobs = no_logprobs()
            if plan.with_logprobs:
                logprobs = completion_logprobs(piece.tokens, len(echoed.get(piece.index, "")), vocabulary)
            if piece.prompt_logprobs is not None:
                logprobs = joined([prompt_logprobs(prompt_ids, piece.prompt_logprobs, vocabulary), logprobs])
            text = echoed[piece.index] + piece.text if first else piece.text
            reason = None if piece.finish_reason is None else piece.finish_reason.value
            yield _Gain(piece.index, text, logprobs, piece.generated, reason)


def _response(plan: CompletionPlan, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
    identity = plan.identity
    return Completion(
        id=identity.id,
        created=identity.created,
        model=identity.model.revision,
        system_fingerprint=identity.fingerprint,
        choices=choices,
        usage=usage,
    )


def _json(plan: CompletionPlan, chunk: Completion) -> str:
    return chunk.model_dump_json(exclude=None if plan.include_usage else {"usage"})
