"""The four legacy lists stay parallel, and offsets point into the text."""

from __future__ import annotations

from serving.completions.logprobs import completion_logprobs, joined, no_logprobs, prompt_logprobs
from serving.engine.engine import TokenLogprob
from serving.engine.text import PlacedToken
from serving.engine.vocabulary import read_vocabulary
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
VOCABULARY = read_vocabulary(TOKENIZER)


def test_a_prompts_first_token_is_null():
    ids = TOKENIZER.encode("the 🦊")
    entries = [None, *(TokenLogprob(token_id, -1.5, ((5, -0.1),)) for token_id in ids[1:])]
    block = prompt_logprobs(ids, entries, VOCABULARY)
    assert (block.token_logprobs[0], block.top_logprobs[0]) == (None, None)
    assert {len(values) for values in (block.tokens, block.token_logprobs, block.top_logprobs, block.text_offset)} == {
        len(ids)
    }
    assert block.tokens[-1] == "bytes:\\x8a"
    assert block.text_offset[-4:] == [4] * 4


def test_the_token_itself_is_among_its_alternatives():
    token = PlacedToken(2, TokenLogprob(70, -float("inf"), ((71, -0.1),)))
    block = completion_logprobs([token], 3, VOCABULARY)
    assert block.top_logprobs == [{VOCABULARY.label(71): -0.1, VOCABULARY.label(70): -9999.0}]
    assert block.text_offset == [5]


def test_blocks_join_in_order():
    one = completion_logprobs([PlacedToken(0, TokenLogprob(70, -1.0))], 0, VOCABULARY)
    assert joined([no_logprobs(), one, one]).token_logprobs == [-1.0, -1.0]
    assert joined([]) == no_logprobs()
