"""Every id has the bytes that the tokenizer's own decoder gives it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from serving.engine.vocabulary import VocabularyError, read_vocabulary
from tests.tiny import SENTENCES, SPECIALS, make_tokenizer

TEXT = "Hello, 世界! 🦊🦊 naïve — tab\tand\nline"


def test_bytes_join_to_the_text():
    tokenizer = make_tokenizer()
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.size == len(tokenizer)
    ids = tokenizer.encode(TEXT)
    assert vocabulary.spell(ids) == TEXT == tokenizer.decode(ids)


def test_control_tokens_are_spelled_but_are_no_text():
    vocabulary = read_vocabulary(make_tokenizer())
    assert len(vocabulary.controls) == len(SPECIALS)
    for token_id in vocabulary.controls:
        assert vocabulary.bytes_of(token_id).decode() in SPECIALS
        assert vocabulary.text_bytes(token_id) == b""


@pytest.mark.parametrize("text", ["", "a", TEXT, SENTENCES[0] * 20, "<|im_end|>" * 50, "a<|im_start|>" * 9])
def test_the_fewest_tokens_are_never_more_than_there_are(text):
    tokenizer = make_tokenizer()
    fewest = read_vocabulary(tokenizer).fewest_tokens(text)
    assert fewest <= len(tokenizer.encode(text))
    assert fewest >= max(text.count("<|"), bool(text))


def test_half_a_character_is_written_in_escapes():
    tokenizer = make_tokenizer()
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.label(tokenizer.encode("🦊")[0]) == "\\xf0"


def test_ids_past_the_vocabulary_are_empty():
    vocabulary = read_vocabulary(make_tokenizer())
    assert vocabulary.text_bytes(vocabulary.size + 7) == b""


def byte_fallback_tokenizer(decoder) -> PreTrainedTokenizerFast:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "▁a": 257, "b": 258}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    raw.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_byte_fallback_tokens_are_their_byte():
    vocabulary = read_vocabulary(byte_fallback_tokenizer(decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])))
    assert vocabulary.spell([257, 258, *"é".encode(), 256]) == " abé "


def test_an_unknown_decoder_is_refused():
    with pytest.raises(VocabularyError, match="WordPiece"):
        read_vocabulary(byte_fallback_tokenizer(decoders.WordPiece()))
    with pytest.raises(VocabularyError, match="no fast tokenizer"):
        read_vocabulary(object())
