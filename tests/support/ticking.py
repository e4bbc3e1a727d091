"""Measure for how long an event loop stands still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

__all__ = ["STILL", "ticking"]

#: Seconds for which an event loop may stand still: less than these tests' waits, more than a machine that is busy takes it away for.
STILL = 1.0


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
