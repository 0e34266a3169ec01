"""The words of a text, normalised: what two texts are compared by."""

from __future__ import annotations

import re
import unicodedata

# A Chinese or Japanese character, or a Korean syllable, counts as a word.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+")


def normalise(text: str) -> str:
    """Returns the text in NFKC, without case, and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """Returns the words of the normalised text; signs and white space are none."""
    return _WORD.findall(normalise(text))
