"""A relay before a server that counts round trips: how often a client asked something and waited for what came back."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import suppress
from typing import Self

import sqlalchemy as sa

__all__ = ["Relay"]


class Relay:
    """Relays TCP connections to the server of a URL. Use as a context manager; it runs in a thread of this process.

    Args:
        url: The server's.

    Attributes:
        counts: ``trips``: what a client says before it gets an answer is one, if it gets one. ``commits``: how often it says COMMIT.
    """

    def __init__(self, url: str) -> None:
        self._server = sa.make_url(url)
        self.counts: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The server's URL by way of this relay."""
        return self._server.set(host="127.0.0.1", port=self._port).render_as_string(hide_password=False)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._relay, "127.0.0.1", 0, limit=1 << 20)
        self._port = self._listener.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        server, to_server = await asyncio.open_connection(self._server.host, self._server.port)
        waiting = False

        async def ask() -> None:
            nonlocal waiting
            while said := await client.read(1 << 20):
                self.counts["commits"] += said.upper().count(b"COMMIT")
                waiting = True
                to_server.write(said)
                await to_server.drain()

        async def answer() -> None:
            nonlocal waiting
            while said := await server.read(1 << 20):
                self.counts["trips"] += waiting
                waiting = False
                to_client.write(said)
                await to_client.drain()

        ends = {asyncio.ensure_future(ask()), asyncio.ensure_future(answer())}
        try:
            with suppress(OSError, asyncio.CancelledError):
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
            to_server.close()
            to_client.close()
            self._tasks.discard(task)
