"""What a text looks like: its script, and whether it ends in the middle of a sentence."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from functools import lru_cache

from training.words import words

NO_LETTERS = "none"
_OTHER = "Other"
_RANGES = (  # first and last code point of Unicode's blocks, in order; what is between them is another script
    (0x0041, 0x024F, "Latin"),
    (0x0370, 0x03FF, "Greek"),
    (0x0400, 0x052F, "Cyrillic"),
    (0x0531, 0x058F, "Armenian"),
    (0x0591, 0x05FF, "Hebrew"),
    (0x0600, 0x077F, "Arabic"),
    (0x0900, 0x097F, "Devanagari"),
    (0x0980, 0x09FF, "Bengali"),
    (0x0B80, 0x0BFF, "Tamil"),
    (0x0E00, 0x0E7F, "Thai"),
    (0x10A0, 0x10FF, "Georgian"),
    (0x1100, 0x11FF, "Hangul"),
    (0x1E00, 0x1EFF, "Latin"),
    (0x1F00, 0x1FFF, "Greek"),
    (0x3005, 0x3007, "Han"),
    (0x3040, 0x30FF, "Kana"),
    (0x3400, 0x9FFF, "Han"),
    (0xAC00, 0xD7AF, "Hangul"),
    (0xF900, 0xFAFF, "Han"),
    (0xFF21, 0xFF5A, "Latin"),
    (0x20000, 0x3FFFF, "Han"),
)
_STARTS = [first for first, _, _ in _RANGES]
_FENCE = "```"
_NO_PROSE = re.compile(r"\s*(?:[-*•·#|>]|\d+[.)、]|\$|\\)|.*(?:https?://|[{};=<>|])")
_LONG_LINE = 8  # words; a shorter last line may be a title, an answer in a word, or a line of a poem


def script_of(text: str) -> str:
    """Returns the script of most letters, `none` where there are no letters. Tells scripts apart, not languages."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else NO_LETTERS
    counts = Counter[str]()
    for character, times in Counter(text).items():
        if character.isalpha():
            counts[_script(character)] += times
    return counts.most_common(1)[0][0] if counts else NO_LETTERS


def has_words(text: str) -> bool:
    """Whether there is a letter or a digit, or a sign such as an emoji that is no punctuation."""
    return any(unicodedata.category(character)[0] in "LNS" for character in text)


def ends_mid_sentence(text: str) -> bool:
    """Whether the last line is long prose that ends in a word or a comma, or a code block is left open.

    Lists, headings, tables, formulas and code may end without a stop.
    """
    if text.count(_FENCE) % 2:
        return True
    last = text.rstrip().rpartition("\n")[2]
    if not last or not (last[-1].isalnum() or last[-1] in ",，、-–—(（"):
        return False
    return not _NO_PROSE.match(last) and _is_long(last)


def _is_long(line: str) -> bool:
    count = len(words(line))
    return count >= (_LONG_LINE if script_of(line) not in ("Han", "Kana") else 2 * _LONG_LINE)


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    at = bisect_right(_STARTS, ord(character)) - 1
    return _RANGES[at][2] if at >= 0 and ord(character) <= _RANGES[at][1] else _OTHER
