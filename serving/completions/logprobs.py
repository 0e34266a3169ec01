"""The legacy log-probabilities: four parallel lists over tokens and their offsets in the text."""

from __future__ import annotations

from collections.abc import Sequence

from serving.answer import MIN_LOGPROB
from serving.completions.protocol import LegacyLogprobs
from serving.engine.engine import TokenLogprob
from serving.engine.text import PlacedToken, spelled_offsets
from serving.engine.vocabulary import Vocabulary


def no_logprobs() -> LegacyLogprobs:
    return LegacyLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])


def prompt_logprobs(
    prompt_ids: Sequence[int], entries: Sequence[TokenLogprob | None], vocabulary: Vocabulary
) -> LegacyLogprobs:
    return LegacyLogprobs(
        tokens=[_label(token_id, vocabulary) for token_id in prompt_ids],
        token_logprobs=[None if entry is None else _clamped(entry.logprob) for entry in entries],
        top_logprobs=[None if entry is None else _top(entry, vocabulary) for entry in entries],
        text_offset=list(spelled_offsets(vocabulary, prompt_ids)),
    )


def completion_logprobs(tokens: Sequence[PlacedToken], shift: int, vocabulary: Vocabulary) -> LegacyLogprobs:
    """`shift` is the length of an echoed prompt, in characters."""
    return LegacyLogprobs(
        tokens=[_label(token.logprob.token_id, vocabulary) for token in tokens],
        token_logprobs=[_clamped(token.logprob.logprob) for token in tokens],
        top_logprobs=[_top(token.logprob, vocabulary) for token in tokens],
        text_offset=[shift + token.offset for token in tokens],
    )


def joined(blocks: Sequence[LegacyLogprobs]) -> LegacyLogprobs:
    return LegacyLogprobs(
        tokens=[item for block in blocks for item in block.tokens],
        token_logprobs=[item for block in blocks for item in block.token_logprobs],
        top_logprobs=[item for block in blocks for item in block.top_logprobs],
        text_offset=[item for block in blocks for item in block.text_offset],
    )


def _top(entry: TokenLogprob, vocabulary: Vocabulary) -> dict[str, float]:
    """OpenAI lists the token itself too where it is not among the best."""
    best = {_label(token_id, vocabulary): _clamped(logprob) for token_id, logprob in entry.top}
    return best | {_label(entry.token_id, vocabulary): _clamped(entry.logprob)}


def _label(token_id: int, vocabulary: Vocabulary) -> str:
    """OpenAI writes a token that is no whole character as bytes:\\xf0\\x9f."""
    raw = vocabulary.bytes_of(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _clamped(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
