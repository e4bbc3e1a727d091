"""Read from a connection's socket whether its peer has closed it, and set how long the peer may be silent."""

from __future__ import annotations

import os
import select
import socket

__all__ = ["has_something_to_say", "notice_silence"]

#: Seconds of silence after which TCP probes the other host, the pause between two probes, and how many may fail. A NAT or a firewall forgets
#: a connection after some minutes of silence; probes prevent this in most of them.
_IDLE, _PAUSE, _QUESTIONS = 30, 10, 3

#: Seconds for what was sent to be received. The kernel's own is some fifteen minutes of repetitions.
_RECEIVED_WITHIN = 30


def has_something_to_say(descriptor: int) -> bool:
    """Return whether there is something to read although nothing was asked: the end of the connection, or a last message."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(0))


def notice_silence(descriptor: int) -> None:
    """Make a connection break within a minute if the other host is out of reach. A reachable host may take its time to answer."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family == getattr(socket, "AF_UNIX", None):
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _IDLE),
            ("TCP_KEEPALIVE", _IDLE),  # as macOS calls the same
            ("TCP_KEEPINTVL", _PAUSE),
            ("TCP_KEEPCNT", _QUESTIONS),
            ("TCP_USER_TIMEOUT", _RECEIVED_WITHIN * 1000),
        ):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
