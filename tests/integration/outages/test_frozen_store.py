"""A server that is frozen, or cut off from its disk: it takes connections and statements, and answers nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa

from celery_idempotent import SQLStore, StoreUnavailableError
from celery_idempotent.core.records import Duplicate, Inserted, MessageKey, NewMessage, RowFilter
from celery_idempotent.stores.sql import connection
from tests.support.servers import PrivateMariaDB, PrivateServer, skip_if_not_installed
from tests.support.waiting import wait_until


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Iterator[PrivateServer]:
    if request.param == "postgresql":
        yield request.getfixturevalue("postgresql")
        return
    with skip_if_not_installed(), PrivateMariaDB() as server:
        yield server


def message(message_id: str) -> NewMessage:
    return NewMessage(MessageKey(message_id, "t"), f"id of {message_id}")


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call comes to, within a time in which a caller would not yet despair."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(call())
        except StoreUnavailableError as error:
            answers.append(error)

    threading.Thread(target=ask, daemon=True).start()
    wait_until(lambda: answers, timeout=60, describe="an answer, or the news that there is none")
    return answers[0]


def test_neither_a_new_connection_nor_an_old_one_hangs(server: PrivateServer) -> None:
    table = "queue_log_frozen"
    with closing(SQLStore(server.url, table=table)) as old, closing(SQLStore(server.url, table=table)) as new:
        old.init()
        assert old.record(message("m-1")) == Inserted()

        server.pause()
        in_flight, unsent = outcome(lambda: old.record(message("m-2"))), outcome(lambda: new.record(message("m-3")))
        server.resume()

        assert "gave no answer within 2 s" in str(in_flight)
        assert not in_flight.unsent
        assert isinstance(unsent, StoreUnavailableError)
        assert unsent.unsent
        # It was frozen, not deaf: what it had been asked is done as soon as it can.
        wait_until(lambda: old.find(message("m-2").key), describe="the row of the unanswered message")
        assert isinstance(old.record(message("m-2")), Duplicate)
        assert new.record(message("m-3")) == Inserted()


def test_a_command_may_take_longer(server: PrivateServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER", 0.2)
    engine = sa.create_engine(server.url, poolclass=sa.NullPool)
    with closing(SQLStore(server.url, table="queue_log_slow")) as store, engine.connect() as other:
        store.init()
        store.record(message("m"))
        lock = {"postgresql": "LOCK TABLE queue_log_slow", "mysql": "LOCK TABLES queue_log_slow WRITE"}
        other.execute(sa.text(lock[engine.dialect.name]))
        releasing = threading.Timer(1.0, other.close)
        releasing.start()

        began = time.monotonic()
        with pytest.raises(StoreUnavailableError, match=r"within 0\.2 s"):
            store.find(message("m").key)
        assert [row.key.message_id for row in store.rows(RowFilter())] == ["m"]

        assert time.monotonic() - began > 0.5, "the listing waited for the lock"
        releasing.join()
