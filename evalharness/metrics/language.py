"""The writing of a reference, which decides how its words are counted."""

from __future__ import annotations

import enum
import re

from rouge_score.tokenizers import DefaultTokenizer

# Han with extensions, kana, and the ideographic marks that are letters; Hangul is written with spaces.
_CJK = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
_LETTER = re.compile(r"[^\W_]")
_CHARACTER_TOKENS = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")
_UNICODE_TOKENS = re.compile(r"\w+|[^\w\s]")


class Script(enum.Enum):
    LATIN = "latin"
    CJK = "cjk"
    OTHER = "other"  # neither: rouge_score's own tokenizer would find no words in it


def script_of(reference: str) -> Script:
    """Returns CJK where most letters are CJK characters, LATIN where at least half are a-z and digits."""
    letters = len(_LETTER.findall(reference))
    plain = sum(character.isascii() and character.isalnum() for character in reference)
    if 2 * len(_CJK_CHARACTER.findall(reference)) > letters:
        return Script.CJK
    return Script.LATIN if plain and 2 * plain >= letters else Script.OTHER


def rouge_tokens(text: str, script: Script) -> list[str]:
    """Returns rouge_score's default words, one token a CJK character, or Unicode words and signs."""
    if script is Script.LATIN:
        return list(DefaultTokenizer(use_stemmer=False).tokenize(text))
    pattern = _CHARACTER_TOKENS if script is Script.CJK else _UNICODE_TOKENS
    return pattern.findall(text.lower())


def length_words(text: str) -> int:
    """Returns the number of words, a CJK character being one each."""
    return len(_CHARACTER_TOKENS.findall(text))
