"""Work ends with its client, its result wins where both come at once, and who else cancels it is obeyed."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from serving.disconnect import unless_gone
from serving.errors import ClientClosed


async def stays():
    await asyncio.Event().wait()


async def leaves():
    return {"type": "http.disconnect"}


async def leaves_soon():
    await asyncio.sleep(0.01)
    return {"type": "http.disconnect"}


async def do(receive, work):
    async with unless_gone(receive):
        return await work


def test_a_result_is_returned_and_an_error_raised():
    async def number():
        return 5

    async def fail():
        raise KeyError("x")

    assert asyncio.run(do(stays, number())) == 5
    assert asyncio.run(do(leaves, number())) == 5
    with pytest.raises(KeyError):
        asyncio.run(do(stays, fail()))


def test_leaving_cancels_the_work_and_waits_for_its_end():
    ended = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.append(True)

    with pytest.raises(ClientClosed):
        asyncio.run(do(leaves, work()))
    assert ended == [True]


def test_who_left_while_the_work_ended_cancels_nothing_that_comes_after_it():
    async def check():
        for turns in range(6):  # in one of them the client leaves in the turn in which the work ends
            result = asyncio.get_running_loop().create_future()

            async def leaves_with_it(turns=turns, result=result):
                for _ in range(turns):
                    await asyncio.sleep(0)
                if not result.done():
                    result.set_result(turns)
                return {"type": "http.disconnect"}

            with suppress(ClientClosed):
                assert await do(leaves_with_it, result) == turns
            await asyncio.sleep(0.001)
            assert asyncio.current_task().cancelling() == 0

    asyncio.run(check())


def test_a_cancellation_from_elsewhere_stays_one():
    async def check():
        task = asyncio.create_task(do(stays, asyncio.sleep(60)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await do(stays, asyncio.sleep(60))
        with pytest.raises(ClientClosed):
            async with asyncio.timeout(60):
                await do(leaves_soon, asyncio.sleep(60))

    asyncio.run(check())
