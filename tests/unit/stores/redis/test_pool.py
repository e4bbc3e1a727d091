"""Threads share the idle connections of a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_idempotent.stores.redis.pool import THE_SERVER, ConnectionPool


class Idle:
    """A connection that nobody uses."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.meanwhile = meanwhile
        self.closed = False

    def can_read(self) -> bool:
        return False

    def disconnect(self) -> None:
        self.closed = True
        self.meanwhile()


class Contended(list[Any]):
    """A list whose last connection another thread takes between a look and a grasp."""

    def __bool__(self) -> bool:
        return True


def opened(**idle: Any) -> ConnectionPool:
    return ConnectionPool(idle={(host, 1): connections for host, connections in idle.items()})


def test_a_connection_is_used_again() -> None:
    pool = ConnectionPool()
    connection: Any = Idle()
    pool.give_back(THE_SERVER, connection)
    assert pool.take(THE_SERVER) is connection
    assert pool.take(THE_SERVER) is None


def test_a_connection_that_another_thread_takes_first_is_none() -> None:
    assert opened(a=Contended()).take(("a", 1)) is None


def test_closing_goes_on_when_another_thread_takes_the_last_connection() -> None:
    connection: Any = Idle()
    pool = opened(a=Contended(), b=[connection])
    pool.close()
    assert connection.closed


def test_closing_goes_on_when_another_thread_connects_to_another_server() -> None:
    pool = ConnectionPool()
    late: Any = Idle()
    first: Any = Idle(meanwhile=lambda: pool.idle.setdefault(("late", 1), []))
    pool.give_back(("first", 1), first)
    pool.give_back(("second", 1), late)
    pool.close()
    assert first.closed
    assert late.closed


def test_what_is_given_back_after_the_end_is_closed() -> None:
    pool = ConnectionPool()
    connection: Any = Idle()
    pool.close()
    pool.give_back(THE_SERVER, connection)
    assert connection.closed
    assert pool.take(THE_SERVER) is None
