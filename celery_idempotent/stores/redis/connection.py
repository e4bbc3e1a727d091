"""Run operations on a server: one round trip per call, and what to do if there is no answer.

An idle connection that the server has closed is noticed at its socket, without a round trip. If a connection breaks during an operation, the
operation is repeated once on a new one. Its first attempt may have taken effect, so the session tells the operation (``is_retry``).
It waits for an answer for :data:`ANSWER` seconds at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,  # noqa: A004 - redis-py's name
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,  # noqa: A004 - redis-py's name
    TryAgainError,
)

from celery_idempotent.errors import AccessDeniedError, StoreError
from celery_idempotent.stores.faults import unavailable
from celery_idempotent.stores.redis.address import Address
from celery_idempotent.stores.redis.layout import Layout
from celery_idempotent.stores.redis.pool import (
    THE_SERVER,
    CheckedOut,
    Connection,
    ConnectionPool,
    NoAdmissionError,
    NoConnectionError,
    Place,
)
from celery_idempotent.stores.redis.session import ScriptSession

__all__ = ["Server", "connect"]

T = TypeVar("T")

#: Seconds to wait for an answer: far more than one takes, and less than a broker waits for a heartbeat.
ANSWER = 20.0

#: Seconds to wait until a server accepts a connection.
CONNECT = 10.0

#: Temporary refusals, after which nothing was done: no memory, no disk, another script that runs too long, a failover.
_PASSING = (OutOfMemoryError, MasterDownError, ClusterDownError, TryAgainError)
_PASSING_TEXTS = ("MISCONF", "BUSY ", "NOREPLICAS", "UNKILLABLE")


class Server:
    """A server that has all shards. It has no lock that a fork could leave locked.

    Args:
        address: Its address.
        layout: The keys of the log.
        prepare: Called in each process before the first operation, until it succeeds.
    """

    #: Whether one server has all shards.
    whole = True

    def __init__(self, address: Address, layout: Layout, prepare: Callable[[ScriptSession], object]) -> None:
        self._address = address
        self._layout = layout
        self._prepare = prepare
        # By process id. After a fork, the child keeps a reference to what the parent opened: otherwise, the garbage collector would
        # close the parent's connections.
        self._pools: dict[int, ConnectionPool] = {}

    def __str__(self) -> str:
        return self._address.text

    def run(self, operation: Callable[[ScriptSession], T], *, prepared: bool = True) -> T:
        """Run an operation on a connection, repeating it once if that breaks.

        Args:
            operation: Given a session.
            prepared: Whether the layout must be checked first; ``False`` for operations that do it themselves.

        Raises:
            StoreUnavailableError: No connection, or it broke twice, or no answer, or a temporary refusal.
            StoreError: Any other refusal; a repeat would not change it.
        """
        is_retry = demoted = False
        while True:
            # ``setdefault`` is atomic.
            pool = self._pools.get(os.getpid()) or self._pools.setdefault(os.getpid(), ConnectionPool())
            connections = CheckedOut(pool, self._connect, at_once=self._address.at_once, patience=CONNECT)
            session = ScriptSession(self, self._layout, connections, is_retry=is_retry)
            try:
                with connections:
                    if prepared and not pool.ready:
                        self._prepare(session)
                        pool.ready = True
                    return operation(session)
            except (NoAdmissionError, AuthenticationError) as error:
                raise unavailable(
                    f"the queue log at {self} refused: {error}", sent=is_retry or session.partly, kind=AccessDeniedError
                ) from error
            except NoConnectionError as error:
                pool.slots = {}
                raise unavailable(
                    f"the queue log at {self} cannot be reached: {error}", sent=is_retry or session.partly
                ) from error
            except ReadOnlyError as error:
                # It is no longer the master, and did nothing: find the new master.
                self.close()
                is_retry = is_retry or session.partly
                if demoted:
                    raise unavailable(f"the queue log at {self} is on a replica: {error}", sent=is_retry) from error
                demoted = True
            except ResponseError as error:
                raise self._explained(error, is_retry or session.partly) from error
            except TimeoutError as error:
                # Idle connections are closed too, so that no one else waits as long on one.
                self.close()
                # No repeat, as after a broken connection: the server is there, and had its time.
                raise unavailable(f"the queue log at {self} gave no answer in time: {error}", sent=True) from error
            except BusyLoadingError as error:
                raise unavailable(
                    f"the queue log at {self} is loading its data", sent=is_retry or session.partly
                ) from error
            except ConnectionError as error:
                # Another node may have its slots by now.
                pool.slots = {}
                if is_retry:
                    raise unavailable(f"the queue log at {self} gave no answer: {error}", sent=True) from error
                is_retry = True

    def close(self) -> None:
        """Close this process's connections. The next operation opens new ones."""
        pool = self._pools.pop(os.getpid(), None)
        if pool is not None:
            pool.close()

    def place_of(self, tag: bytes, pool: ConnectionPool) -> Place:  # noqa: ARG002 - there is one
        """Return the server that has a shard."""
        return THE_SERVER

    def _connect(self, place: Place) -> Connection:  # noqa: ARG002 - there is one
        where = dict(zip(("host", "port"), self._address.hosts[0], strict=True)) if self._address.hosts else {}
        return connect(self._address, **where)

    def _explained(self, error: ResponseError, sent: bool) -> StoreError:
        text = f"the queue log at {self} refused: {error}"
        # Without memory, a server refuses only what would begin a row, and then nothing of it was done.
        if isinstance(error, _PASSING) or str(error).startswith(_PASSING_TEXTS):
            return unavailable(text, sent=sent)
        return StoreError(text)


def connect(address: Address, **where: Any) -> Connection:
    """Open a connection to one server of an address."""
    timeouts = {"socket_connect_timeout": CONNECT, "socket_timeout": ANSWER}
    connection: Connection = address.connection(**{**timeouts, **address.options, **where})
    connection.connect()
    return connection
