"""Pieces of several choices come as they are made, and leaving frees every one."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from serving.engine.completion import Choice, complete, complete_all
from serving.engine.engine import Delta, FinishReason
from serving.engine.fake_engine import FakeEngine
from serving.engine.vocabulary import read_vocabulary
from serving.errors import DeadlineExceeded, EngineDead
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


async def read_alone(engine, about, within_s=None, **fields):
    """Yields the pieces of one choice that no task of its own reads."""
    choices = [Choice(0, ask(about, **fields))]
    async with aclosing(complete_all(engine, VOCABULARY, choices, within_s, buffered=False)) as pieces:
        tasks = len(asyncio.all_tasks())
        async for piece in pieces:
            assert len(asyncio.all_tasks()) == tasks
            yield piece


def test_an_unbuffered_choice_alone_says_the_same_in_the_readers_task():
    async def check(engine, about):
        choices = [Choice(0, ask(about, max_tokens=20))]
        buffered = [piece.text async for piece in complete_all(engine, VOCABULARY, choices)]
        assert [piece.text async for piece in read_alone(engine, about, max_tokens=20)] == buffered
        both = [Choice(index, ask(about, max_tokens=20)) for index in range(2)]
        seen = [piece.index async for piece in complete_all(engine, VOCABULARY, both, buffered=False)]
        assert sorted(seen) != seen, "several still take turns"

    run_check(check, subject())


def test_an_unbuffered_choice_ends_by_leaving_by_its_error_and_in_its_time():
    async def check(engine, about):
        async with aclosing(read_alone(engine, about, max_tokens=200)) as pieces:
            await anext(pieces)
        assert (engine.stats().running, engine.aborted) == (0, 1)
        with pytest.raises(DeadlineExceeded):
            await anext(read_alone(engine, about, within_s=-1.0))
        engine._token_delay_s = 60.0
        with pytest.raises(DeadlineExceeded, match="x-request-timeout-s"):
            await anext(read_alone(engine, about, within_s=0.02))
        assert engine.stats().running == 0
        engine.die()
        with pytest.raises(EngineDead):
            await anext(read_alone(engine, about))

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
