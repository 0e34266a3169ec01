"""The text stream: token ids in, text deltas out, whole characters only and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from serving.engine.engine import TokenLogprob
from serving.engine.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token and where its text begins, in characters of the completion."""

    offset: int
    logprob: TokenLogprob


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str = ""
    tokens: tuple[PlacedToken, ...] = ()


class TextStream:
    """Decodes one completion in linear time. A token is given out with the first character of its text.

    `stopped` turns true once a stop string stands in the text; what follows its beginning is dropped.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()) -> None:
        self._vocabulary = vocabulary
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, not given out: it may be the beginning of a stop string
        self._given = 0  # characters
        self._tokens: deque[PlacedToken] = deque()
        self.stopped = False

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = (), *, final: bool = False
    ) -> TextPiece:
        """Returns what can be given out now; `final` also gives out what was held back."""
        for position, token_id in enumerate(token_ids):
            if logprobs:
                self._tokens.append(PlacedToken(self._given + len(self._held), logprobs[position]))
            self._held += self._decoder.decode(self._vocabulary.text_bytes(token_id))
        if final:
            self._held += self._decoder.decode(b"", final=True)
        return self._release(final)

    def _release(self, final: bool) -> TextPiece:
        cut = min((at for stop in self._stop if (at := self._held.find(stop)) >= 0), default=None)
        if cut is not None:
            self.stopped = True
        elif final:
            cut = len(self._held)
        else:
            cut = min((self._could_begin(stop) for stop in self._stop), default=len(self._held))
        text, self._held = self._held[:cut], self._held[cut:]
        self._given += len(text)
        return TextPiece(text, self._take_tokens(everything=final and not self.stopped))

    def _could_begin(self, stop: str) -> int:
        """Returns where the longest suffix begins that `stop` begins with."""
        at = self._held.find(stop[0], max(len(self._held) - len(stop) + 1, 0))
        while at >= 0 and not stop.startswith(self._held[at:]):
            at = self._held.find(stop[0], at + 1)
        return at if at >= 0 else len(self._held)

    def _take_tokens(self, *, everything: bool) -> tuple[PlacedToken, ...]:
        taken = []
        while self._tokens and (everything or self._tokens[0].offset < self._given):
            taken.append(self._tokens.popleft())
        return tuple(taken)


def spelled_offsets(vocabulary: Vocabulary, token_ids: Sequence[int]) -> tuple[int, ...]:
    """Returns where each token's text begins in `vocabulary.spell(token_ids)`, in characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, length = [], 0
    for token_id in token_ids:
        offsets.append(length)
        length += len(decoder.decode(vocabulary.bytes_of(token_id)))
    return tuple(offsets)
