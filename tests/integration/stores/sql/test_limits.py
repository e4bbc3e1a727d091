"""What is not waited for any more is not left to the server: it gives up by itself, or is asked to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.stores.sql import SQLStore, connection
from celery_idempotent.testing.examples import KEY, new_message, processing
from tests.integration.stores.broken_connections import InterruptedByTestError, interrupted_when
from tests.support.waiting import wait_until

pytestmark = pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)


@contextmanager
def locked(store: SQLStore) -> Iterator[Callable[[], int]]:
    """Lock the table as somebody else; yield what asks how many statements wait for that."""
    if store.engine.dialect.name == "postgresql":
        lock, unlock = "LOCK TABLE queue_log", "ROLLBACK"
        waiting = (
            "SELECT count(*) FROM pg_locks AS waits JOIN pg_locks AS has USING (relation)"
            " WHERE has.pid = {} AND has.granted AND NOT waits.granted"
        )
        me = "SELECT pg_backend_pid()"
    else:
        lock, unlock = "LOCK TABLES queue_log WRITE", "UNLOCK TABLES"
        waiting = (
            "SELECT count(*) FROM information_schema.processlist"
            " WHERE db = DATABASE() AND state LIKE 'Waiting for table%' AND id <> {}"
        )
        me = "SELECT CONNECTION_ID()"
    eyes = store.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with eyes, store.engine.connect() as other:
        number = other.execute(sa.text(me)).scalar()
        other.execute(sa.text(lock))
        yield lambda: int(eyes.execute(sa.text(waiting.format(number))).scalar_one())
        other.execute(sa.text(unlock))


@pytest.fixture(params=["a URL", "an engine"])
def impatient(
    request: pytest.FixtureRequest, store_url: str, store: SQLStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SQLStore]:
    """Yield a store that gives up after a second."""
    monkeypatch.setattr(connection, "ANSWER", 1.0)
    engine = sa.create_engine(store_url)
    store = SQLStore(store_url if request.param == "a URL" else engine)
    store.check()
    yield store
    store.close()
    engine.dispose()


def test_a_statement_that_was_given_up_takes_no_effect_later(store: SQLStore, impatient: SQLStore) -> None:
    with locked(store) as waiting:
        with pytest.raises(StoreUnavailableError, match="gave no answer within 1 s") as caught:
            impatient.record(new_message())
        assert caught.value.unsent, "it is known to have had no effect"
        assert waiting() == 0
    assert store.find(KEY) is None


def test_operators_wait_as_long_as_they_like(store: SQLStore, impatient: SQLStore) -> None:
    with locked(store) as waiting:
        asking = threading.Thread(target=impatient.counts)
        asking.start()
        wait_until(waiting)
        # Longer than the limit, as another statement on its way meanwhile shows.
        with pytest.raises(StoreUnavailableError):
            impatient.find(KEY)
        assert waiting() == 1
    asking.join()
    with locked(store), pytest.raises(StoreUnavailableError, match="within 1 s"):
        impatient.find(KEY)  # on the same connection, it may be


def test_a_lower_limit_of_the_users_stays(store_url: str) -> None:
    url = sa.make_url(store_url)
    if url.get_backend_name() == "postgresql":
        mine = url.update_query_dict({"options": f"{url.query['options']} -cstatement_timeout=3s"})
        ask = "SHOW statement_timeout"
    else:
        mine = url.update_query_dict({"init_command": "SET max_statement_time = 3"})
        ask = "SELECT CONCAT(ROUND(@@max_statement_time), 's')"
    store = SQLStore(mine)
    store.init()
    assert store._database.run(lambda on: on.connection.execute(sa.text(ask)).scalar()) == "3s"
    store.close()


def test_an_interrupted_statement_is_cancelled(store: SQLStore, store_url: str) -> None:
    held = processing(store)
    mine = SQLStore(store_url)
    mine.check()
    with locked(store) as waiting:
        with interrupted_when(lambda: waiting() > 0), pytest.raises(InterruptedByTestError):
            mine.complete(held, result=b"1")
        # Long before the limit, and not only when the lock is free and the server sees that its client has gone.
        wait_until(lambda: waiting() == 0, timeout=10)
    mine.close()
