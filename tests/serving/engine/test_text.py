"""Text deltas join to the whole text, in whole characters, without a stop string, in linear time."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.engine import TokenLogprob
from serving.engine.text import TextStream, spelled_offsets
from serving.engine.vocabulary import Vocabulary, read_vocabulary
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
VOCABULARY = read_vocabulary(TOKENIZER)
BYTES = Vocabulary(tuple(bytes([byte]) for byte in range(256)), frozenset())


def deltas(ids, stop=(), vocabulary=VOCABULARY):
    stream = TextStream(vocabulary, stop)
    found = []
    for token_id in ids:
        found.append(stream.push([token_id]).text)
        if stream.stopped:
            return found, True
    found.append(stream.push([], final=True).text)
    return found, stream.stopped


@pytest.mark.parametrize("text", ["plain", "你好,世界", "🦊🧑‍🚀👩🏽‍💻", "é̂ naïve", "a\ufffdb"])
def test_characters_are_never_split(text):
    found, _ = deltas(TOKENIZER.encode(text))
    assert "".join(found) == text
    assert text.count("\ufffd") == sum(delta.count("\ufffd") for delta in found)


@given(st.binary(max_size=60))
def test_any_bytes_join_to_what_a_whole_decode_gives(raw):
    found, _ = deltas(raw, vocabulary=BYTES)
    assert "".join(found) == raw.decode("utf-8", errors="replace")


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_where_the_first_stop_string_is_complete(text, stop):
    found, stopped = deltas(text.encode(), stop, BYTES)
    ends = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    if not ends:
        assert (("".join(found)), stopped) == (text, False)
    else:
        first_end = min(ends)[0]
        expected = min(start for end, start in ends if end == first_end)
        assert (("".join(found)), stopped) == (text[:expected], True)


def test_a_stop_string_across_deltas_is_held_back_and_released():
    stream = TextStream(BYTES, ["STOP"])
    assert [stream.push([byte]).text for byte in b"aST-STO"] == ["a", "", "", "ST-", "", "", ""]
    assert stream.push(b"P and more").text == ""
    assert stream.stopped


def test_what_could_have_been_a_stop_is_given_out_at_the_end():
    assert deltas(b"end ST", ["STOP"], BYTES) == (["e", "n", "d", " ", "", "", "ST"], False)


def test_a_half_character_at_the_end_becomes_one_replacement():
    assert "".join(deltas("🦊".encode()[:3], vocabulary=BYTES)[0]) == "\ufffd"


def logprobs(ids):
    return [TokenLogprob(token_id, -1.0) for token_id in ids]


def test_tokens_come_with_the_first_character_of_their_text():
    stream = TextStream(BYTES, ["ST"])
    raw = "é!S".encode()
    pieces = [stream.push([byte], logprobs([byte])) for byte in raw]
    assert [[(token.offset, token.logprob.token_id) for token in piece.tokens] for piece in pieces] == [
        [],
        [(0, raw[0]), (0, raw[1])],
        [(1, raw[2])],
        [],
    ]
    assert [token.offset for token in stream.push([], final=True).tokens] == [2]


def test_tokens_of_a_stop_string_are_dropped():
    stream = TextStream(BYTES, ["ST"])
    piece = stream.push(b"aSTb", logprobs(b"aSTb"))
    assert (piece.text, [token.logprob.token_id for token in piece.tokens]) == ("a", [ord("a")])


def test_cost_is_linear_even_in_garbage():
    generator = random.Random(0)

    def seconds(count):
        stream = TextStream(BYTES, ["\x00never"])
        ids = [generator.randrange(0x80, 0xC0) for _ in range(count)]  # continuation bytes: no character ever ends
        begin = time.process_time()
        for token_id in ids:
            stream.push([token_id])
        return time.process_time() - begin

    seconds(1000)
    assert seconds(40_000) < 10 * max(seconds(10_000), 0.005)  # quadratic would be 16 times, linear is 4


def test_spelled_offsets_point_into_the_spelled_text():
    ids = TOKENIZER.encode("a 🦊 fox<|im_end|>!")
    text, offsets = VOCABULARY.spell(ids), spelled_offsets(VOCABULARY, ids)
    assert len(offsets) == len(ids)
    assert text[offsets[-1] :] == "!"
    assert text[offsets[-2] :] == "<|im_end|>!"
