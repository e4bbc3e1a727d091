"""Connections that break: a statement is repeated once, and stays right if it had taken effect the first time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
import sqlalchemy as sa

from celery_idempotent.core.records import (
    Claim,
    NewMessage,
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
    new_message,
    pending,
    processing,
    read,
)
from tests.integration.stores.broken_connections import (
    BrokenConnectionContract,
    InterruptedByTestError,
    interrupted_when,
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


class TestSQL(BrokenConnectionContract):
    answers_of_a_claim = 3

    @pytest.fixture(autouse=True)
    def _here(self, store_url: str) -> None:
        self.url = store_url

    def open_at(self, port: int) -> SQLStore:
        return SQLStore(sa.make_url(self.url).set(port=port, username="shop", password="hunter2"))

    def answers_before_an_expired_id_is_taken(self, store: Store) -> int:
        # MariaDB takes three steps here: the insert that yields, the row, the update.
        return 0 if self.url.startswith("postgresql") else 2


def test_a_connection_that_breaks_twice_is_unavailable(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    pending(tapped_store)
    wire_tap.cut(times=2)
    with pytest.raises(StoreUnavailableError):
        tapped_store.claim(new_message(), worker=WORKER, lease=LEASE, grace=GRACE)
    assert read(tapped_store).status in {Status.PENDING, Status.PROCESSING}


# -- exceptions from elsewhere ------------------------------------------------------------------------------------------------


def waiting_for(holder: sa.Connection) -> sa.TextClause:
    """Asks how many wait for a lock of this connection (PostgreSQL), or of this test (MariaDB)."""
    if holder.dialect.name == "postgresql":
        pid = holder.execute(sa.text("SELECT pg_backend_pid()")).scalar()
        return sa.text(f"SELECT count(*) FROM pg_stat_activity WHERE {pid} = ANY(pg_blocking_pids(pid))")
    return sa.text(
        "SELECT count(*) FROM information_schema.innodb_trx t JOIN information_schema.processlist p"
        " ON p.id = t.trx_mysql_thread_id WHERE t.trx_state = 'LOCK WAIT' AND p.db = DATABASE()"
    )


def test_a_time_limit_in_a_statement_breaks_no_connection(store: SQLStore, tapped_store: SQLStore) -> None:
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
