"""A statement that is not answered in time has its connection cut; any other is left alone."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_idempotent.stores.sql.watch import Watch
from tests.support.waiting import wait_until


def descriptors_of(end: socket.socket) -> int:
    """How many descriptors of a socket this process has. Of other files it may open and close some beside the test."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            count += link.readlink().name == f"socket:[{os.fstat(end.fileno()).st_ino}]"
    return count


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield a client's and a server's end of a connection."""
    client, server = socket.socketpair()
    with client, server:
        yield client, server


def test_a_silent_server_is_cut_off(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = ends
    client.settimeout(30)
    server.settimeout(30)

    with Watch(0.05).over(client.fileno()) as watched:
        assert client.recv(1) == b"", "the client is told that nothing will come"

    assert watched.cut
    assert server.recv(1) == b"", "and so is the server, if it looks"


def test_an_answer_in_time_leaves_the_connection_as_it_is(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = ends
    watch = Watch(0.2)
    with watch.over(client.fileno()) as watched:
        server.sendall(b"1")
        assert client.recv(1) == b"1"

    wait_until(lambda: watch._thread is None, describe="the end of the watch")

    assert not watched.cut
    server.sendall(b"2")
    assert client.recv(1) == b"2"


def test_each_is_cut_in_its_own_time(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = ends
    slow, other = socket.socketpair()
    with slow, other:
        slow.settimeout(30)
        watch = Watch(0.1)
        with watch.over(slow.fileno()) as first:
            assert slow.recv(1) == b""
            with watch.over(client.fileno()) as second:
                server.sendall(b"1")
                assert client.recv(1) == b"1"
        assert (first.cut, second.cut) == (True, False)


def test_a_socket_that_took_the_closed_ones_number_is_not_cut(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = ends
    watch = Watch(0.1)
    victim, peer = socket.socketpair()
    number = victim.fileno()
    with peer, watch.over(number) as watched:
        victim.close()
        os.dup2(client.fileno(), number)
        try:
            wait_until(lambda: watched.cut, describe="the cut")
            server.sendall(b"1")
            assert os.read(number, 1) == b"1"
        finally:
            os.close(number)


def test_everything_is_cleaned_up(ends: tuple[socket.socket, socket.socket]) -> None:
    client, _ = ends
    watch = Watch(0.05)
    threads = set()
    for _ in range(20):
        with watch.over(client.fileno()):
            threads.add(watch._thread)
    wait_until(lambda: watch._thread is None, describe="the end of the watch")
    for thread in threads:
        assert thread is not None
        thread.join(timeout=30)
        assert not thread.is_alive()

    assert descriptors_of(client) == 1


def test_the_thread_ends_when_it_is_told_to_rest(ends: tuple[socket.socket, socket.socket]) -> None:
    client, _ = ends
    watch = Watch(3600.0)
    for _ in range(2):  # and another statement is watched again
        with watch.over(client.fileno()) as watched:
            watch.rest()
            thread = watch._thread
            assert thread is not None
            thread.join(timeout=0.2)
            assert thread.is_alive(), "the statement is still watched"
        watch.rest()
        wait_until(lambda: watch._thread is None, timeout=10.0, describe="the end of the watch")
        assert not watched.cut
