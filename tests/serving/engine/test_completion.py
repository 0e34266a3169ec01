"""Pieces of several choices come as they are made, and leaving frees every one."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from serving.engine.completion import Choice, complete, complete_all
from serving.engine.engine import Delta, FinishReason
from serving.engine.fake_engine import FakeEngine
from serving.engine.vocabulary import read_vocabulary
from serving.errors import EngineDead
from tests.serving.engine.contract import ask, run_check, until
from tests.serving.engine.test_fake_engine import subject
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
VOCABULARY = read_vocabulary(TOKENIZER)


def test_a_stop_string_finishes_with_stop_and_aborts_the_engine():
    script = TOKENIZER.encode("one two three four")

    async def check(engine, about):
        request = ask(about, max_tokens=len(script))
        pieces = [piece async for piece in complete(engine, VOCABULARY, Choice(0, request, ("three",)))]
        assert "".join(piece.text for piece in pieces) == "one two "
        assert [piece.finish_reason for piece in pieces[-2:]] == [None, FinishReason.STOP]
        assert engine.aborted == 1

    run_check(check, subject(script=script))


def test_the_first_piece_says_how_long_its_choice_waited():
    async def check(engine, about):
        choice = Choice(0, ask(about, max_tokens=3))
        waits = [piece.waited_s async for piece in complete(engine, VOCABULARY, choice)]
        assert waits[0] is not None
        assert waits[1:] == [None, None]

    run_check(check, subject())


def test_choices_run_at_the_same_time():
    async def check(engine, about):
        choices = [Choice(index, ask(about, max_tokens=50)) for index in range(4)]
        seen, peak = [], 0
        async for piece in complete_all(engine, VOCABULARY, choices):
            seen.append(piece.index)
            peak = max(peak, engine.stats().running)
        assert peak == 4
        assert sorted(seen) != seen, "they take turns"
        assert {seen.count(index) for index in range(4)} == {50}

    run_check(check, subject())


def test_leaving_frees_every_choice():
    async def check(engine, about):
        choices = [Choice(index, ask(about, max_tokens=200)) for index in range(3)]
        async with aclosing(complete_all(engine, VOCABULARY, choices)) as pieces:
            for _ in range(5):
                await anext(pieces)
        assert (engine.stats().running, engine.aborted) == (0, 3)

    run_check(check, subject())


def test_the_first_error_ends_all_choices():
    async def check(engine, about):
        choices = [Choice(index, ask(about, max_tokens=200)) for index in range(3)]
        pieces = complete_all(engine, VOCABULARY, choices)
        await anext(pieces)
        engine.die()
        with pytest.raises(EngineDead):
            async for _ in pieces:
                pass
        await until(lambda: engine.stats().running == 0)

    run_check(check, subject())


class Forgetful(FakeEngine):
    async def generate(self, request):
        yield Delta((5,))


def test_a_stream_without_a_finish_reason_is_an_error():
    async def run():
        engine = Forgetful(context_length=9, vocabulary_size=400)
        with pytest.raises(EngineDead, match="without a finish reason"):
            async for _ in complete(engine, VOCABULARY, Choice(0, ask(subject()))):
                pass

    asyncio.run(run())
