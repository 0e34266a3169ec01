"""Work ends with its client, and its result wins where both come at once."""

from __future__ import annotations

import asyncio

import pytest

from serving.disconnect import unless_gone
from serving.errors import ClientClosed


async def stays():
    await asyncio.Event().wait()


async def leaves():
    return {"type": "http.disconnect"}


def test_a_result_is_returned_and_an_error_raised():
    async def number():
        return 5

    async def fail():
        raise KeyError("x")

    assert asyncio.run(unless_gone(stays, number())) == 5
    assert asyncio.run(unless_gone(leaves, number())) == 5
    with pytest.raises(KeyError):
        asyncio.run(unless_gone(stays, fail()))


def test_leaving_cancels_the_work_and_waits_for_its_end():
    ended = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.append(True)

    with pytest.raises(ClientClosed):
        asyncio.run(unless_gone(leaves, work()))
    assert ended == [True]
