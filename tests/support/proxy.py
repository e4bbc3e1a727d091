"""A relay before a server, which can lose what the server answers: the fault that a stopped server makes only by chance."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from sqlalchemy import URL, make_url

__all__ = ["Proxy"]

#: Linux: a filter on a socket sees each packet for it first. This one keeps nothing of any.
_SO_ATTACH_FILTER, _BPF_RETURN = 26, 0x06


class Proxy:
    """Relays TCP connections to a server. Use as a context manager.

    Args:
        url: The server's URL.

    Attributes:
        connections: How many connections were accepted, those that were closed at once among them.
    """

    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._clients: set[socket.socket] = set()
        self._swallow: bytes | None = None
        self._closed_for_now = False
        self.connections = 0
        self.swallowed = threading.Event()

    @property
    def url(self) -> str:
        """The server's URL by way of this relay."""
        url: URL = self._target.set(host="127.0.0.1", port=self._listener.getsockname()[1])
        return url.render_as_string(hide_password=False)

    def swallow_answer_to(self, words: bytes) -> None:
        """Let the server have the next request that contains the words, and lose its answer: from then on it is :meth:`closed`."""
        self.swallowed.clear()
        with self._lock:
            self._swallow = words

    def close_for_now(self) -> None:
        """Break every connection and take no other."""
        with self._lock:
            self._closed_for_now = True
        self._break_all()

    def lead_to(self, url: str) -> None:
        """Have new connections go to another server, as a name or an address does after a failover; those that are open stay where they are."""
        self._target = make_url(url)

    def forget_connections(self) -> None:
        """Have the kernel drop what clients send on the connections that are open, as a NAT does that has forgotten them: not even the receipt
        is confirmed.
        """
        drop = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, 0))
        program = struct.pack("HL", 1, ctypes.addressof(drop))
        with self._lock:
            for client in self._clients & self._open:
                client.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def reopen(self) -> None:
        """Relay again."""
        with self._lock:
            self._closed_for_now = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Shut down first: closing alone does not wake the thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._break_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with self._lock:
                refused = self._closed_for_now
            if refused:
                client.close()
                continue
            try:
                server = socket.create_connection((self._target.host or "127.0.0.1", self._target.port or 0))
            except OSError:  # the server is down: so is this
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
                self._clients.add(client)
            swallowing = threading.Event()
            for relay, ends in ((self._ask, (client, server)), (self._answer, (server, client))):
                threading.Thread(target=relay, args=(*ends, swallowing), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket, swallowing: threading.Event) -> None:
        for data in _received(client):
            with self._lock:
                if self._swallow is not None and self._swallow in data:
                    self._swallow = None
                    self._closed_for_now = True
                    swallowing.set()
            if not _sent(server, data):
                break
        self._end(client, server)

    def _answer(self, server: socket.socket, client: socket.socket, swallowing: threading.Event) -> None:
        for data in _received(server):
            if swallowing.is_set():
                break
            if not _sent(client, data):
                break
        self._end(client, server)
        if swallowing.is_set():
            self._break_all()
            self.swallowed.set()

    def _end(self, *ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _break_all(self) -> None:
        with self._lock:
            ends, self._open = self._open, set()
        self._end(*ends)
        for end in ends:
            end.close()


def _received(end: socket.socket) -> Iterator[bytes]:
    with contextlib.suppress(OSError):
        while data := end.recv(65536):
            yield data


def _sent(end: socket.socket, data: bytes) -> bool:
    try:
        end.sendall(data)
    except OSError:
        return False
    return True
