"""What a connection's socket tells, and is told: whether its peer has closed it, and how long a peer may be silent."""

from __future__ import annotations

import os
import select
import socket

__all__ = ["has_something_to_say", "notice_silence"]

#: Seconds of silence after which the other host is asked whether it is there, the pause between two such questions, and how many are asked
#: in vain. A NAT or a firewall forgets a connection after some minutes of silence; most do not, while it is asked.
_IDLE, _PAUSE, _QUESTIONS = 30, 10, 3

#: Seconds for what was sent to be received. The kernel's own is some fifteen minutes of repetitions.
_RECEIVED_WITHIN = 30


def has_something_to_say(descriptor: int) -> bool:
    """Return whether something waits to be read where nothing was asked: the end, or words of farewell."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(0))


def notice_silence(descriptor: int) -> None:
    """Have a connection break within a minute if the other host is out of reach. A host that is there may take its time to answer."""
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
