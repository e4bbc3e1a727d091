"""Deadlocks, locks that are waited for in vain, a busy file: repeated a few times, then reported."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

import pytest
import sqlalchemy as sa

from celery_idempotent.errors import StoreError, StoreUnavailableError
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.testing.examples import KEY, new_message, processing, read
from tests.support.waiting import wait_until


class Blocker:
    """Another transaction, which rolls back once the store's statement has failed so many times."""

    def __init__(self, other: sa.Connection, *, after_failures: int) -> None:
        self.other = other
        self.after_failures = after_failures
        self.failures = 0

    def __enter__(self) -> Self:
        sa.event.listen(sa.Engine, "handle_error", self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        sa.event.remove(sa.Engine, "handle_error", self._note)

    def _note(self, context: sa.ExceptionContext) -> None:
        self.failures += 1
        if self.failures == self.after_failures:
            self.other.rollback()


def impatient(store_url: str) -> str:
    """Return the URL of a client that waits for a lock for a moment only."""
    url = sa.make_url(store_url)
    match url.get_backend_name():
        case "sqlite":
            return f"{store_url}?timeout=0.01"
        case "mysql" | "mariadb":
            return url.update_query_dict({"init_command": "SET innodb_lock_wait_timeout = 1"}).render_as_string(
                hide_password=False
            )
        case _:
            raise NotImplementedError


@pytest.mark.parametrize("store_url", ["sqlite", "mariadb"], indirect=True)
def test_a_lock_that_is_not_had_in_time_is_asked_for_again(store: SQLStore, store_url: str) -> None:
    held = processing(store)
    mine = SQLStore(impatient(store_url))
    mine.check()
    with store.engine.connect() as other:
        other.execute(sa.text("UPDATE queue_log SET duplicates = 7"))
        with Blocker(other, after_failures=2) as blocker:
            assert mine.complete(held, result=b"1")
    assert blocker.failures == 2
    assert (read(store).result, read(store).duplicates) == (b"1", 0)
    mine.close()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_file_that_stays_busy_is_unavailable(store: SQLStore, store_url: str) -> None:
    held = processing(store)
    mine = SQLStore(impatient(store_url))
    mine.check()
    with store.engine.connect() as other:
        other.execute(sa.text("UPDATE queue_log SET duplicates = 7"))
        with Blocker(other, after_failures=1000) as blocker, pytest.raises(StoreUnavailableError, match="locked"):
            mine.complete(held, result=b"1")
        other.rollback()
    assert blocker.failures > 2
    assert mine.complete(held, result=b"1")
    mine.close()


@contextmanager
def commits_when_waited_for(other: sa.Connection) -> Iterator[None]:
    """Commit somebody else's transaction once a statement waits for its lock."""
    pid = other.execute(sa.text("SELECT pg_backend_pid()")).scalar()
    waiting = sa.text("SELECT count(*) FROM pg_stat_activity WHERE :pid = ANY(pg_blocking_pids(pid))")

    def watch() -> None:
        with other.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as eyes:
            wait_until(lambda: eyes.execute(waiting, {"pid": pid}).scalar())
        other.commit()

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    watcher.join()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_a_serialization_failure_is_repeated(store: SQLStore, store_url: str) -> None:
    held = processing(store)
    mine = SQLStore(
        sa.make_url(store_url)
        .update_query_dict(
            {"options": str(sa.make_url(store_url).query["options"]) + " -cdefault_transaction_isolation=serializable"}
        )
        .render_as_string(hide_password=False)
    )
    mine.check()
    with store.engine.connect() as other:
        other.execute(sa.text("UPDATE queue_log SET duplicates = 7"))
        with Blocker(other, after_failures=1000) as blocker, commits_when_waited_for(other):
            assert mine.complete(held, result=b"1")
    assert blocker.failures == 1
    assert (read(store).result, read(store).duplicates) == (b"1", 7)
    mine.close()


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
def test_data_that_do_not_fit_are_no_outage(store: SQLStore) -> None:
    with pytest.raises(StoreError, match="refused") as caught:
        store.claim(new_message(), worker="w" * 256, lease=60.0, grace=30.0)
    assert not isinstance(caught.value, StoreUnavailableError)
    assert store.find(KEY) is None


def test_a_file_that_is_no_database_is_no_outage(tmp_path: Path) -> None:
    path = tmp_path / "queue_log.db"
    path.write_bytes(b"not a database, and longer than a header of one hundred bytes would be " * 4)
    with pytest.raises(StoreError, match="not a database") as caught:
        SQLStore(f"sqlite:///{path}").find(KEY)
    assert not isinstance(caught.value, StoreUnavailableError)


def test_a_file_that_cannot_be_opened_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="unable to open"):
        SQLStore(f"sqlite:///{tmp_path / 'missing' / 'queue_log.db'}").find(KEY)


def test_a_sqlite_file_is_written_ahead_and_synced(tmp_path: Path) -> None:
    store = SQLStore(f"sqlite:///{tmp_path / 'queue_log.db'}")
    store.check()
    with store.engine.connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar() == 2
        assert connection.execute(sa.text("PRAGMA busy_timeout")).scalar() == 30_000
    store.close()
    with closing(sqlite3.connect(tmp_path / "queue_log.db")) as file:
        assert file.execute("SELECT count(*) FROM queue_log").fetchone() == (0,)
