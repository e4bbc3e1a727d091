"""Measure for how long an event loop stands still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

__all__ = ["STILL", "ticking"]

#: Seconds for which an event loop may stand still: less than any wait for a server, more than a coroutine's own work.
STILL = 0.5


@asynccontextmanager
async def ticking() -> AsyncIterator[list[float]]:
    """Have a coroutine tick in the block; yield the seconds between its ticks."""
    pauses: list[float] = []

    async def tick() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            pauses.append(time.monotonic() - began)

    ticker = asyncio.create_task(tick())
    try:
        yield pauses
    finally:
        ticker.cancel()
        with suppress(asyncio.CancelledError):
            await ticker
