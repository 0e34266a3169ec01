"""The disconnect watch: work for a client ends when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from serving.errors import ClientClosed


@asynccontextmanager
async def unless_gone(receive: Receive) -> AsyncIterator[None]:
    """Cancels what is awaited inside, and raises ClientClosed, where the client leaves first.

    The request's body has to be read already: `receive` then reports nothing but the disconnect.
    """
    work = asyncio.current_task()
    assert work is not None
    cancelling, inside, gone = work.cancelling(), True, False

    def cancel(_: asyncio.Task[None]) -> None:
        nonlocal gone
        if inside:  # not where the work ended in the same turn of the event loop
            gone = True
            work.cancel()

    leaving = asyncio.create_task(_left(receive))
    leaving.add_done_callback(cancel)
    try:
        yield
    except asyncio.CancelledError:
        if gone and work.uncancel() <= cancelling:
            raise ClientClosed("the client left before its answer was ready") from None
        raise
    finally:
        inside = False
        leaving.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
