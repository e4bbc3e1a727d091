"""Watch for a server that does not answer: ask it to give up the statement, then cut the connection, so that the caller gets an error.

Drivers limit the time to connect, but not the time for an answer. A server may be frozen, cut off from its disk, or waiting for
a forgotten lock. Then it does not answer, and TCP notices nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

__all__ = ["Watch", "Watched", "beside_us"]

logger = logging.getLogger("celery_idempotent")

#: After this part of the patience, ask the server to give up. Most servers then answer within the rest.
_ASKED_AFTER = 0.9


@dataclass(slots=True, eq=False)
class Watched:
    """A statement under way, while its ``with`` block lasts.

    Attributes:
        watch: The watch.
        descriptor: A duplicate of the socket's, so that it cannot mean another socket after the driver has closed its own.
        due: When its answer becomes overdue, by the monotonic clock.
        cancel: Asks the server to give up; ``None`` if there is no way, or it was asked.
        cut: Whether its answer was overdue, and the connection was shut down.
    """

    watch: Watch
    descriptor: int
    due: float
    cancel: Callable[[], object] | None
    cut: bool = False

    @property
    def next(self) -> float:
        """When to act next."""
        return self.due if self.cancel is None else self.due - self.watch.patience * (1 - _ASKED_AFTER)

    def __enter__(self) -> Self:
        self.watch._begin(self)  # noqa: SLF001 - of this module
        return self

    def __exit__(self, *exception: object) -> None:
        self.watch._end(self)  # noqa: SLF001


class Watch:
    """Watches running statements, in one thread per process. It ends some time after the last statement, or when :meth:`rest` is called.

    Args:
        patience: Seconds; > 0.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._lock = threading.Lock()
        self._watched: set[Watched] = set()
        self._thread: threading.Thread | None = None
        # The thread waits until it is released. No event, whose lock a finalizer that rests could find taken by its own thread.
        self._resting = threading.Lock()
        self._resting.acquire()

    def over(self, descriptor: int, cancel: Callable[[], object] | None = None) -> Watched:
        """Shut down the socket unless the block ends within the patience.

        Args:
            descriptor: The socket's.
            cancel: Asks the server to give up, some time before; called in a separate thread.

        Raises:
            OSError: This process has no descriptor left.
        """
        return Watched(self, os.dup(descriptor), time.monotonic() + self.patience, cancel)

    def rest(self) -> None:
        """End the thread at once if no statement runs; the next statement starts another one."""
        with contextlib.suppress(RuntimeError):  # it was released already
            self._resting.release()

    def _begin(self, watched: Watched) -> None:
        with self._lock:
            self._watched.add(watched)
            if self._thread is None:
                self._start()

    def _end(self, watched: Watched) -> None:
        with self._lock:
            self._forget(watched)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="celery-idempotent-watch", daemon=True)
        # An interpreter that shuts down starts no threads; its last statements are not watched.
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                for watched in [watched for watched in self._watched if watched.next <= now]:
                    if watched.cancel is not None:
                        beside_us(watched.cancel)
                        watched.cancel = None
                        continue
                    watched.cut = True
                    _shut_down(watched.descriptor)
                    self._forget(watched)
                if not self._watched:
                    self._thread = None
                    return
                pause = min(watched.next for watched in self._watched) - now
            self._resting.acquire(timeout=max(0.0, pause))  # a statement that comes meanwhile is due later than these

    def _forget(self, watched: Watched) -> None:
        # By the block or the thread, whichever is first; only by the thread if a signal (a soft time limit) interrupted `over`.
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


def beside_us(cancel: Callable[[], object]) -> threading.Thread:
    """Ask a server to give up, in a separate thread, because the server may be out of reach."""

    def ask() -> None:
        try:
            cancel()
        except Exception as error:  # noqa: BLE001 - any of the driver's; its statement ends by the server's own limit, if at all
            logger.debug("a statement could not be cancelled: %s", error)

    thread = threading.Thread(target=ask, name="celery-idempotent-cancel", daemon=True)
    with contextlib.suppress(RuntimeError):  # an interpreter that shuts down starts no threads
        thread.start()
    return thread
