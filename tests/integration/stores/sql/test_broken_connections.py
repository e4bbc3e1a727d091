"""Connections that break: a statement is repeated once, and stays right if it had taken effect the first time."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from uuid import uuid4

import pytest
import sqlalchemy as sa

from celery_idempotent.core.records import (
    Claim,
    Claimed,
    Inserted,
    NewMessage,
    NotClaimed,
    Owner,
    ProcessedStatus,
    Status,
)
from celery_idempotent.core.store import Store
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.testing.examples import (
    GRACE,
    KEY,
    LEASE,
    WORKER,
    claim,
    expired_id,
    new_message,
    pending,
    processing,
    read,
    try_claim,
)
from tests.support.waiting import wait_until
from tests.support.wire_tap import WireTap

pytestmark = pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)


# -- stale connections ------------------------------------------------------------------------------------------------------


@contextmanager
def victim_of(store: SQLStore, store_url: str) -> Iterator[tuple[SQLStore, Callable[[], None]]]:
    """Another store on the same table, and a function that has the server end its connections."""
    name = f"victim-{uuid4().hex[:12]}"
    url = sa.make_url(store_url)
    if url.get_backend_name() == "postgresql":
        url = url.update_query_dict({"application_name": name})
        find = f"SELECT pid FROM pg_stat_activity WHERE application_name = '{name}'"
        end = "SELECT pg_terminate_backend({})"
    else:
        # The database is this test's own, and so is every connection to it.
        find = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()"
        end = "KILL {}"

    def end_connections() -> None:
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            found = list(connection.execute(sa.text(find)).scalars())
            assert found
            for each in found:
                connection.execute(sa.text(end.format(each)))
            wait_until(lambda: not connection.execute(sa.text(find)).scalars().all())

    victim = SQLStore(url)
    yield victim, end_connections
    victim.close()


def test_a_connection_that_the_server_ended_is_replaced(store: SQLStore, store_url: str) -> None:
    with victim_of(store, store_url) as (victim, end_connections):
        row = pending(victim)
        end_connections()

        held = claim(victim)

        assert held == Claim(row.key, 1)
        assert victim.complete(held, result=b"1")


def test_every_connection_of_the_pool_may_be_stale(store: SQLStore, store_url: str) -> None:
    with victim_of(store, store_url) as (victim, end_connections):
        pending(victim)
        met = threading.Barrier(3)

        def use() -> None:
            # In its adopt callback each thread holds a connection.
            message = new_message(type(KEY)(threading.current_thread().name, "t"))

            def adopt() -> NewMessage:
                met.wait(10)
                return message

            victim.claim(message, worker=WORKER, lease=LEASE, grace=GRACE, adopt=adopt)

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        end_connections()

        assert all(read(victim).status is Status.PENDING for _ in range(4))


# -- an answer that is lost ---------------------------------------------------------------------------------------------------


def test_a_record_whose_answer_was_lost_is_recorded(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    wire_tap.cut()
    assert tapped_store.record(new_message()) == Inserted()
    assert read(tapped_store).task_id == "task-1"
    assert wire_tap.connections == 2


def test_a_record_that_found_another_task_is_not_mistaken(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    pending(tapped_store, task_id="task-0")
    wire_tap.cut()
    assert tapped_store.record(new_message()) != Inserted()


def test_an_expired_id_recorded_with_its_answer_lost_is_recorded(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    old = expired_id(tapped_store)
    # MariaDB takes three steps here: the insert that yields, the row, the update.
    wire_tap.cut(after_answers=0 if tapped_store.engine.dialect.name == "postgresql" else 2)
    assert tapped_store.record(new_message(task_id="task-2")) == Inserted()
    assert read(tapped_store).token == old.token


def test_a_claim_whose_answer_was_lost_is_claimed_once(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    pending(tapped_store)
    wire_tap.cut()
    assert try_claim(tapped_store) == Claimed(Claim(KEY, 1))
    assert read(tapped_store).token == 1


def test_a_claim_that_found_another_owner_is_not_mistaken(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    processing(tapped_store)
    wire_tap.cut()
    assert isinstance(try_claim(tapped_store, worker="host-b:202"), NotClaimed)


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_an_absent_message_is_claimed_whichever_answer_was_lost(
    tapped_store: SQLStore, wire_tap: WireTap, answers: int
) -> None:
    wire_tap.cut(after_answers=answers)
    assert try_claim(tapped_store) == Claimed(Claim(KEY, 1))
    assert read(tapped_store).token == 1


def test_a_takeover_whose_answer_was_lost_is_taken_over_once(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    tapped_store.expire(processing(tapped_store))
    row = read(tapped_store)
    wire_tap.cut()
    answer = tapped_store.take_over(row, task_id="task-2", worker="host-b:202", lease=LEASE, attempt=0)
    assert answer == Claimed(Claim(KEY, 2))
    assert (read(tapped_store).token, read(tapped_store).takeovers) == (2, 1)


ENDINGS: dict[str, Callable[[Store, Claim], bool]] = {
    "checkpoint": lambda store, held: store.checkpoint(held, result=b"1"),
    "complete": lambda store, held: store.complete(held, result=b"1"),
    "fail": lambda store, held: store.fail(held, error="E: no"),
    "fail by worker": lambda store, held: store.fail(Owner(KEY, WORKER), error="E: no"),
    "retry": lambda store, held: store.retry(held, new_message(attempt=1)),
    "retry by worker": lambda store, held: store.retry(Owner(KEY, WORKER), new_message(attempt=1)),
    "release": lambda store, held: store.release(held),
    "release by worker": lambda store, held: store.release(Owner(KEY, WORKER)),
    "expire": lambda store, held: store.expire(held),
    "renew": lambda store, held: store.renew([held], lease=LEASE) == [],
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_whose_answer_was_lost_was_written(tapped_store: SQLStore, wire_tap: WireTap, ending: str) -> None:
    held = processing(tapped_store)
    wire_tap.cut()
    assert ENDINGS[ending](tapped_store, held)
    assert read(tapped_store).token == held.token


def test_a_withdrawal_whose_answer_was_lost_is_withdrawn(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    pending(tapped_store)
    wire_tap.cut()
    assert tapped_store.withdraw(KEY, task_id="task-1")
    assert tapped_store.find(KEY) is None


def test_compare_and_set_whose_answer_was_lost_was_written(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    row = pending(tapped_store)
    wire_tap.cut()
    assert tapped_store.republish(row)

    wire_tap.cut()
    assert tapped_store.cancel(KEY, task_id="task-1", error="revoked")

    wire_tap.cut()
    assert tapped_store.resubmit(read(tapped_store), new_message(task_id="task-2"))

    tapped_store.expire(claim(tapped_store))
    row = read(tapped_store)
    wire_tap.cut()
    assert tapped_store.abandon(row, error="abandoned")
    assert read(tapped_store).processed_status is ProcessedStatus.FAILURE


# -- no answer at all ---------------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_twice_is_unavailable(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    pending(tapped_store)
    wire_tap.cut(times=2)
    with pytest.raises(StoreUnavailableError):
        tapped_store.claim(new_message(), worker=WORKER, lease=LEASE, grace=GRACE)
    assert read(tapped_store).status in {Status.PENDING, Status.PROCESSING}


def test_a_server_that_is_not_there_is_unavailable_and_its_password_is_not_told(store_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    url = sa.make_url(store_url).set(port=port, username="shop", password="hunter2")
    store = SQLStore(url)
    with pytest.raises(StoreUnavailableError) as caught:
        store.record(new_message())
    assert "hunter2" not in f"{caught.value} {caught.value.__cause__} {store!r}"
    assert f"shop:***@127.0.0.1:{port}" in str(caught.value)


# -- exceptions from elsewhere ------------------------------------------------------------------------------------------------


class InterruptedByTestError(Exception):
    """What a soft time limit is: raised by a signal, wherever the main thread is."""


@contextmanager
def interrupted_when(condition: Callable[[], bool]) -> Iterator[None]:
    """Raise in the main thread as soon as the condition holds."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise InterruptedByTestError

    def watch() -> None:
        # Not more often: InnoDB answers from a cache for as long as it is asked ten times a second.
        wait_until(condition, interval=0.2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()
        signal.signal(signal.SIGUSR1, before)


def waiting_for(holder: sa.Connection) -> sa.TextClause:
    """Asks how many wait for a lock of this connection (PostgreSQL), or of this test (MariaDB)."""
    if holder.dialect.name == "postgresql":
        pid = holder.execute(sa.text("SELECT pg_backend_pid()")).scalar()
        return sa.text(f"SELECT count(*) FROM pg_stat_activity WHERE {pid} = ANY(pg_blocking_pids(pid))")
    return sa.text(
        "SELECT count(*) FROM information_schema.innodb_trx t JOIN information_schema.processlist p"
        " ON p.id = t.trx_mysql_thread_id WHERE t.trx_state = 'LOCK WAIT' AND p.db = DATABASE()"
    )


def test_a_time_limit_in_the_middle_of_a_statement_leaves_no_broken_connection(
    store: SQLStore, tapped_store: SQLStore
) -> None:
    held = processing(tapped_store)
    eyes = store.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with eyes, store.engine.begin() as other:
        other.execute(sa.text("UPDATE queue_log SET duplicates = 7"))  # and holds the row's lock
        waiting = waiting_for(other)
        with (
            interrupted_when(lambda: bool(eyes.execute(waiting).scalar())),
            pytest.raises(InterruptedByTestError),
        ):
            tapped_store.complete(held, result=b"first")
    assert read(tapped_store).duplicates == 7
    assert tapped_store.complete(held, result=b"1")
    assert read(tapped_store).key == KEY


def test_an_adopt_that_fails_leaves_the_store_usable(tapped_store: SQLStore) -> None:
    with pytest.raises(InterruptedByTestError):
        tapped_store.claim(
            new_message(), worker=WORKER, lease=LEASE, grace=GRACE, adopt=partial(_raise, InterruptedByTestError())
        )
    assert tapped_store.find(KEY) is None


def _raise(error: Exception) -> NewMessage:
    raise error
