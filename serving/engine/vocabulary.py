"""The vocabulary: which bytes of text each token id stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class VocabularyError(ValueError):
    """A tokenizer whose ids cannot be turned into bytes one by one."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Bytes by token id. Control tokens are part of no reply's text, but `bytes_of` still spells them."""

    tokens: tuple[bytes, ...]
    controls: frozenset[int]
    longest_bytes: int = field(init=False)  # of one token

    def __post_init__(self) -> None:
        object.__setattr__(self, "longest_bytes", max(map(len, self.tokens), default=0))

    @property
    def size(self) -> int:
        return len(self.tokens)

    def bytes_of(self, token_id: int) -> bytes:
        """Returns b"" for the padding rows that models append to their vocabulary."""
        return self.tokens[token_id] if token_id < len(self.tokens) else b""

    def text_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self.controls else self.bytes_of(token_id)

    def label(self, token_id: int) -> str:
        """Returns the token as text; bytes that are no whole character are written like \\xf0."""
        return self.bytes_of(token_id).decode("utf-8", errors="backslashreplace")

    def fewest_tokens(self, text: str) -> int:
        """Returns a lower bound of the tokens of a user's text, without encoding it."""
        by_length = -(-len(text.encode()) // max(self.longest_bytes, 1))
        by_controls = sum(text.count(self.bytes_of(token_id).decode()) for token_id in self.controls)  # 1 each or more
        return max(by_length, by_controls)

    def spell(self, token_ids: Iterable[int]) -> str:
        """Returns the ids' whole text, control tokens written out."""
        return b"".join(map(self.bytes_of, token_ids)).decode("utf-8", errors="replace")


def read_vocabulary(tokenizer: Any) -> Vocabulary:
    """Reads a fast Hugging Face tokenizer with a byte-level or a byte-fallback decoder; raises VocabularyError else."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise VocabularyError(f"{type(tokenizer).__name__} is no fast tokenizer; add tokenizer.json to the directory")
    decoder = json.dumps(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else "none"
    if '"ByteLevel"' in decoder:
        spell = _ByteLevel(_byte_alphabet()).spell
    elif '"ByteFallback"' in decoder or '"Metaspace"' in decoder:
        spell = _spell_sentencepiece
    else:
        raise VocabularyError(
            f"the tokenizer's decoder is {decoder[:80]}; ByteLevel, ByteFallback and Metaspace are known"
        )
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    texts = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens = (
        str(added[index].content).encode() if index in added else spell(text or "") for index, text in enumerate(texts)
    )
    return Vocabulary(tuple(tokens), frozenset(index for index, token in added.items() if token.special))


@dataclass(frozen=True, slots=True)
class _ByteLevel:
    byte_of: Mapping[str, int]

    def spell(self, token: str) -> bytes:
        return bytes(self.byte_of[character] for character in token)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for the code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _spell_sentencepiece(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()
