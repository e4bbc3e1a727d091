"""One pool per process: across forks, between threads, among greenlets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from celery_idempotent.core.records import Claimed, MessageKey
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.testing.examples import claim, new_message, pending, processing, read, try_claim

on_servers = pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)


def in_child(work: Callable[[], None]) -> None:
    """Run it in a forked child; what it raises fails the test."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            work()
            os.write(writing, b"fine")
        except BaseException as error:  # noqa: BLE001 - the parent has to see any error
            os.write(writing, repr(error).encode())
        finally:
            # As billiard's children do: no exit handlers, no destructors.
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        heard = pipe.read()
    os.waitpid(pid, 0)
    assert heard == b"fine", heard.decode()


def session(store: SQLStore) -> object:
    """Return the server's name for the connection that the store uses."""
    ask = "SELECT pg_backend_pid()" if store.engine.dialect.name == "postgresql" else "SELECT CONNECTION_ID()"
    return store._database.run(lambda on: on.connection.execute(sa.text(ask)).scalar())


@on_servers
def test_a_child_has_connections_of_its_own(store: SQLStore) -> None:
    held = processing(store)
    parents = session(store)

    def work() -> None:
        assert session(store) != parents
        assert store.complete(held, result=b"child")
        store.close()
        pending(store, key=type(held.key)("from the child", "t"))

    in_child(work)

    assert session(store) == parents
    assert read(store).result == b"child"
    assert read(store, type(held.key)("from the child", "t")).token == 0


def test_a_child_of_a_child_works_too(store: SQLStore) -> None:
    held = processing(store)
    in_child(lambda: in_child(lambda: _ensure(store.complete(held, result=b"grandchild"))))
    assert read(store).result == b"grandchild"


@on_servers
def test_a_child_leaves_the_inherited_pool_of_an_owners_engine_alone(store: SQLStore) -> None:
    engine = store.engine
    owned = SQLStore(engine)
    held = processing(owned)
    parents = session(owned)

    def work() -> None:
        assert session(owned) != parents
        assert owned.complete(held, result=b"child")

    in_child(work)

    assert session(owned) == parents
    assert read(owned).result == b"child"


@on_servers
def test_an_owners_engine_outlives_the_store(store: SQLStore) -> None:
    engine = sa.create_engine(store.engine.url)
    owned = SQLStore(engine)
    processing(owned)
    ask = sa.text("SELECT pg_backend_pid()" if engine.dialect.name == "postgresql" else "SELECT CONNECTION_ID()")
    with engine.begin() as connection:
        before = connection.execute(ask).scalar()
    owned.close()
    with engine.begin() as connection:
        assert connection.execute(ask).scalar() == before
        assert connection.execute(sa.text("SELECT count(*) FROM queue_log")).scalar() == 1
        connection.execute(sa.text("UPDATE queue_log SET duplicates = 7"))
        connection.rollback()
    assert read(owned).duplicates == 0
    engine.dispose()


@on_servers
def test_a_stores_own_connections_are_closed_with_it(store: SQLStore) -> None:
    engine = sa.create_engine(store.engine.url)
    owned = SQLStore(engine)
    processing(owned)
    before = session(owned)
    assert session(owned) == before, "one connection, kept"
    engine.dispose()
    assert session(owned) != before
    engine.dispose()


def test_a_fork_while_another_thread_opens_the_store_does_not_hang(store_url: str, store: SQLStore) -> None:
    held = processing(store)
    fresh = SQLStore(store_url)
    opened = fresh._database._here()
    locked, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with opened._lock:
            locked.set()
            forked.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait(30)
    in_child(lambda: _ensure(fresh.complete(held, result=b"child")))
    forked.set()
    thread.join()
    assert read(fresh).result == b"child"
    fresh.close()


def test_transactions_have_connections_of_their_own(store: SQLStore) -> None:
    # An atomic body keeps its connection while it runs; leases are renewed on another.
    held = processing(store)
    with store.engine.connect() as body:
        body.execute(sa.text("SELECT count(*) FROM queue_log"))
        assert body.in_transaction()
        assert store.renew([held], lease=60.0) == []
        body.rollback()


def _ensure(condition: bool) -> None:
    assert condition


GREENLETS = """
import gevent.monkey
gevent.monkey.patch_all()
import sys
import gevent
import sqlalchemy as sa
from celery_idempotent.core.records import Claimed, MessageKey
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.testing.examples import new_message, processing, read, try_claim, wait_until

store = SQLStore(sys.argv[1])

def run(number):
    won = 0
    for message in range(10):
        key = MessageKey(f"m{message}", "t")
        store.record(new_message(key))
        answer = try_claim(store, new_message(key), worker=f"g{number}")
        won += isinstance(answer, Claimed) and store.complete(answer.claim, result=b"1")
    return won

greenlets = [gevent.spawn(run, number) for number in range(30)]
assert sum(greenlet.get(timeout=60) for greenlet in greenlets) == 10

if "sqlite" not in sys.argv[1]:
    # A greenlet that waits for a lock lets the one run that will give it up; were it not so, none ever would.
    held = processing(store)
    other = store.engine.connect()
    other.execute(sa.text("UPDATE queue_log SET duplicates = 7"))
    waiting = gevent.spawn(store.complete, held, result=b"1")
    waiting.join(timeout=0.2)
    assert not waiting.ready()
    other.commit()
    assert waiting.get(timeout=30)
    assert (read(store).result, read(store).duplicates) == (b"1", 7)
    other.close()
print("fine")
"""


def test_greenlets_share_a_store_and_do_not_block_each_other(store_url: str, store: SQLStore) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", GREENLETS, store_url],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
    )
    assert ended.stdout == "fine\n", ended.stderr


def test_threads_share_a_store(store: SQLStore) -> None:
    pending(store)
    won: list[int] = []
    start = threading.Barrier(12)

    def race(number: int) -> None:
        start.wait(30)
        if isinstance(try_claim(store, worker=f"thread-{number}"), Claimed):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert read(store).worker == f"thread-{won[0]}"
    assert claim(store, new_message(type(read(store).key)("next", "t"))).token == 1


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///{file}"])
def test_a_store_may_be_first_used_by_many_threads_at_once(url: str, tmp_path: Path) -> None:
    for attempt in range(20):
        store = SQLStore(url.format(file=tmp_path / f"{attempt}.db"))
        keys = [MessageKey(f"o-{number}", "charge") for number in range(8)]
        together = threading.Barrier(len(keys))
        errors: list[BaseException] = []

        def record(key: MessageKey) -> None:
            together.wait()  # noqa: B023 - of this round, which ends in it
            try:
                store.record(new_message(key))  # noqa: B023
            except BaseException as error:  # noqa: BLE001 - the test has to see any error
                errors.append(error)  # noqa: B023

        threads = [threading.Thread(target=record, args=(key,)) for key in keys]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert [key for key in keys if store.find(key) is None] == []
        store.close()
