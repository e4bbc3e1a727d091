"""A wire tap between a client and its database: it records requests, and cuts the connection at a chosen answer."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from typing import Self

import sqlalchemy as sa

__all__ = ["WireTap"]


class WireTap:
    """A TCP relay to the server of ``url``; ``self.url`` leads through it.

    Attributes:
        asked: The client's requests since :meth:`listen`, one item per round trip.
        connections: How many there have been.
    """

    def __init__(self, url: str) -> None:
        server = sa.make_url(url)
        assert server.host is not None
        assert server.port is not None
        self._server = (server.host, server.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        through = server.set(host="127.0.0.1", port=self._listener.getsockname()[1])
        if server.get_backend_name() == "postgresql":
            through = through.update_query_dict({"sslmode": "disable"})  # what is encrypted cannot be listened to
        self.url = through.render_as_string(hide_password=False)
        self.asked: list[bytes] = []
        self.connections = 0
        self._answers_until_cut = 0
        self._cuts = 0
        self._client_speaks = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.close()

    def listen(self) -> None:
        """Forget the requests so far."""
        self.asked = []
        self._client_speaks = False

    def cut(self, *, after_answers: int = 0, times: int = 1) -> None:
        """Cut the connection instead of delivering an answer: the server has done as asked, and the client cannot know.

        Args:
            after_answers: So many answers are delivered first.
            times: So many connections are cut in a row, each at its next answer.
        """
        self._answers_until_cut = after_answers
        self._cuts = times

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server, selectors.DefaultSelector() as ready:
            for end in (client, server):
                # An answer is delivered when the server sends it, not when more would fill a packet.
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ready.register(end, selectors.EVENT_READ)
            with contextlib.suppress(OSError):
                while True:
                    for key, _ in ready.select():
                        source = client if key.fileobj is client else server
                        said = source.recv(1 << 20)
                        if not said:
                            return
                        if source is client:
                            self._note(said)
                            server.sendall(said)
                        elif self._delivers():
                            client.sendall(said)
                        else:
                            return

    def _note(self, said: bytes) -> None:
        if self._client_speaks:
            self.asked[-1] += said
        else:
            self.asked.append(said)
        self._client_speaks = True

    def _delivers(self) -> bool:
        first, self._client_speaks = self._client_speaks, False
        if not self._cuts:
            return True
        if self._answers_until_cut:
            self._answers_until_cut -= first
            return True
        self._cuts -= 1
        return False
