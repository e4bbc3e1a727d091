"""A server that takes a statement and says nothing: its connection is cut, so that whoever waits is told.

Drivers bound how long a connection may take, not how long an answer may. A server that is frozen, cut off from its disk, or that
waits for a lock somebody forgot answers neither yes nor no, and TCP finds nothing wrong with it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Watch", "Watched"]


@dataclass(slots=True, eq=False)
class Watched:
    """A statement under way.

    Attributes:
        descriptor: A duplicate of its socket's, so that it can name no other socket when the driver has closed that.
        due: When its answer is overdue, by the monotonic clock.
        cut: Whether it was, and the connection was shut down.
    """

    descriptor: int
    due: float
    cut: bool = False


class Watch:
    """Watches statements for as long as they run: one thread per process, which ends when there is nothing to watch.

    Args:
        patience: Seconds; > 0.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._lock = threading.Lock()
        self._watched: set[Watched] = set()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, descriptor: int) -> Iterator[Watched]:
        """Shut the socket down unless the block ends within the patience."""
        watched = Watched(os.dup(descriptor), time.monotonic() + self.patience)
        with self._lock:
            self._watched.add(watched)
            if self._thread is None:
                self._start()
        try:
            yield watched
        finally:
            with self._lock:
                self._forget(watched)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="celery-idempotent-watch", daemon=True)
        # An interpreter on its way out starts no threads; what is written by then is written unwatched.
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                for watched in [watched for watched in self._watched if watched.due <= now]:
                    watched.cut = True
                    _shut_down(watched.descriptor)
                    self._forget(watched)
                if not self._watched:
                    self._thread = None
                    return
                pause = min(watched.due for watched in self._watched) - now
            time.sleep(pause)  # a statement that comes meanwhile is due later than these

    def _forget(self, watched: Watched) -> None:
        # By whoever is first, and by the thread alone when a signal (a soft time limit) broke into `over`.
        if watched in self._watched:
            self._watched.remove(watched)
            os.close(watched.descriptor)


def _shut_down(descriptor: int) -> None:
    connection = socket.socket(fileno=descriptor)
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # its peer was faster
    finally:
        connection.detach()
