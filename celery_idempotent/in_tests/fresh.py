"""A fresh queue log for each test, for every app.

A log's rows are in memory, and all are deleted before the next test. The log stays in the app's own database if the app's writes have to be
in the same transaction. There, only rows that the test's own process has inserted are deleted: the database may be a real one.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from sqlalchemy import Connection, Engine

from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.core.records import Claimed, Duplicate, Inserted, MessageKey, NewMessage, NotClaimed, RowFilter
from celery_idempotent.errors import ConfigurationError, SchemaError, StoreError
from celery_idempotent.in_tests.deliveries import Deliveries
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.queue_log import QueueLog
from celery_idempotent.stores.redis import RedisStore
from celery_idempotent.stores.sql import SQLStore

if TYPE_CHECKING:
    from celery_idempotent.core.store import Store

__all__ = ["FreshLogs"]

logger = logging.getLogger("celery_idempotent")

#: Rows of a log that are read at most.
_MOST = 10_000


class FreshLogs:
    """What all apps of this process have in place of their queue logs while tests run.

    Args:
        fresh: Whether each test has a fresh log; ``False`` leaves each app its own store.
    """

    def __init__(self, *, fresh: bool = True) -> None:
        self._fresh = fresh
        #: The messages of the test that runs.
        self.deliveries = Deliveries()
        self._places: WeakKeyDictionary[QueueLog, _Place] = WeakKeyDictionary()
        self._by_address: WeakValueDictionary[Any, _Place] = WeakValueDictionary()
        self._used: dict[QueueLog, _Place] = {}
        #: Addresses of logs that share their app's database, as an outbox has shown.
        self._shared: set[Any] = set()
        #: Stores in memory whose apps are gone, by the table's name: a new one takes milliseconds.
        self._free: dict[str, list[_InMemory]] = {}

    def __call__(self, queue_log: QueueLog) -> Store:
        """Return the store of an app's queue log."""
        place = self._places.get(queue_log)
        if place is None:
            with no_fork():
                place = self._places.setdefault(queue_log, self._place_of(queue_log))
        self._used[queue_log] = place
        return place.store(queue_log)

    def install(self) -> None:
        """Have all queue logs ask here for their stores."""
        QueueLog.stand_in = self
        self.deliveries.install()

    def uninstall(self) -> None:
        """Give all apps their own stores again."""
        if QueueLog.stand_in is self:
            QueueLog.stand_in = None
        self.deliveries.uninstall()

    def used(self) -> list[QueueLog]:
        """Return the queue logs that were used since they were emptied, without those that have the same rows."""
        return list({place: queue_log for queue_log, place in reversed(self._used.items())}.values())[::-1]

    def empty(self) -> None:
        """Delete what was written since the last call. Leave alone what the app's own store or its tests undo."""
        used = dict.fromkeys(self._used.values())
        self._used.clear()
        self.deliveries.clear()
        for place in used:
            place.empty()

    def erase(self) -> None:
        """Delete what was written since the logs were emptied, wherever it is."""
        for place in dict.fromkeys(self._used.values()):
            place.erase()

    def written(self, queue_log: QueueLog) -> list[MessageKey]:
        """Return the messages that this test has written to a log; of the app's own store, those that this process has inserted."""
        store = self(queue_log)
        if isinstance(store, _Noting):
            return list(store.inserted)
        return [row.key for row in store.rows(RowFilter(limit=_MOST, oldest_first=True))]

    def inserted(self, queue_log: QueueLog) -> list[MessageKey]:
        """Return the messages that this process has inserted in the app's own store; of another one, none."""
        store = self(queue_log)
        return list(store.inserted) if isinstance(store, _Noting) else []

    def note(self, queue_log: QueueLog, inserted: Sequence[MessageKey]) -> None:
        """Note messages that a child of this process has inserted."""
        store = self(queue_log)
        if isinstance(store, _Noting):
            store.inserted.update(dict.fromkeys(inserted))

    def in_a_file(self, queue_log: QueueLog, *, keep: bool) -> None:
        """Move a log in memory to a temporary file until it is emptied, so that another process can open it.

        Args:
            queue_log: The log.
            keep: Whether its rows move too.

        Raises:
            ConfigurationError: It shares its app's database, which is in memory, or cannot be opened by another process.
        """
        self(queue_log)
        self._used[queue_log].move(queue_log, keep=keep)

    def _place_of(self, queue_log: QueueLog) -> _Place:
        given, settings = queue_log.given_store, queue_log.settings
        if given is not None:
            address: Any = ("given", id(given))
        elif settings.store in ("sqlite://", "sqlite:///:memory:"):
            address = ("in memory", id(queue_log))
        else:
            address = (str(settings.store), settings.table)
        place = self._by_address.get(address)
        if place is None:
            free = self._free.setdefault(settings.table, [])
            memory = free.pop() if free else _InMemory(settings.table)
            place = _Place(memory, given, own=not self._fresh, share=lambda: self._shared.add(address))
            place.is_own = place.is_own or address in self._shared
            memory.place = weakref.ref(place)
            weakref.finalize(place, free.append, memory).atexit = False
            self._by_address[address] = place
        return place


class _Place:
    """Where the rows of one address are.

    Args:
        memory: A store in memory.
        given: The store that the app's code gave; the place keeps it alive.
        own: Whether every store is the app's own, as it is.
        share: Called when the log turns out to share its app's database.
    """

    def __init__(self, memory: _InMemory, given: Store | None, *, own: bool, share: Any) -> None:
        self._memory = memory
        self._given = given
        self._as_it_is = own
        self._share = share
        self._file: SQLStore | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._noting: WeakKeyDictionary[QueueLog, _Noting] = WeakKeyDictionary()
        self._looked_at: WeakKeyDictionary[QueueLog, int] = WeakKeyDictionary()
        self.is_own = False

    def store(self, queue_log: QueueLog) -> Store:
        """Return the store of a log at this address."""
        if self._as_it_is:
            return self._own(queue_log)
        if not self.is_own and self._looked_at.get(queue_log) != len(queue_log.app.tasks):
            self._looked_at[queue_log] = len(queue_log.app.tasks)
            self.is_own = _shares_database(queue_log)
        if self.is_own:
            return self._own(queue_log)
        return self._memory if self._file is None else self._file

    def share(self) -> Store:
        """Use the app's own store from now on; return it."""
        self.is_own = True
        self._share()
        return self._own(next(iter(self._looked_at)))

    def move(self, queue_log: QueueLog, *, keep: bool) -> None:
        store = self.store(queue_log)
        if self._as_it_is or self.is_own:
            if not isinstance(queue_log.own_store, SQLStore):
                raise ConfigurationError(
                    f"the queue log has to be emptied for each killed process, and {queue_log.own_store!r} cannot be: "
                    f"use a log in memory (idempotent_fresh_log), or in a SQL database"
                )
            if getattr(store, "in_memory", False):
                raise ConfigurationError(
                    f"a killed process needs a database that two processes can open, and that of {queue_log!r} is in memory: "
                    f"give the tests a file or a server (with Django on SQLite: DATABASES['default']['TEST'] = {{'NAME': 'test.db'}})"
                )
            return
        if self._file is None:
            self._folder = tempfile.TemporaryDirectory(prefix="queue_log_")
            path = Path(self._folder.name, "queue_log.db")
            self._file = SQLStore(f"sqlite:///{path}", table=queue_log.settings.table)
            if keep:
                self._memory.copy_to(path)

    def empty(self) -> None:
        """Undo what was written, unless something else does."""
        if self._file is not None and self._folder is not None:
            self._file.close()
            self._folder.cleanup()
            self._file = self._folder = None
        for noting in list(self._noting.values()):
            if not (self._as_it_is or noting.undone_by_tests):
                noting.erase()
            noting.inserted.clear()
        self._memory.erase()

    def erase(self) -> None:
        """Delete what was written."""
        for noting in list(self._noting.values()):
            noting.erase()
        (self._memory if self._file is None else self._file).erase()

    def _own(self, queue_log: QueueLog) -> Store:
        return self._noting.get(queue_log) or self._noting.setdefault(queue_log, _Noting(queue_log.own_store, {}))


def _shares_database(queue_log: QueueLog) -> bool:
    """Return whether what an app writes itself has to be in the database of its queue log."""
    given = queue_log.given_store
    if given is not None:
        # A store of a class of the user's own may be a test's.
        return type(given) not in (SQLStore, RedisStore) or (isinstance(given, SQLStore) and given.shares_engine)
    if str(queue_log.settings.store).startswith("django:"):
        return True
    return _has_atomic_tasks(queue_log) and callable(getattr(queue_log.own_store, "within", None))


def _has_atomic_tasks(queue_log: QueueLog) -> bool:
    for task in list(queue_log.app.tasks.values()):
        try:
            if is_guarded(task) and task.idempotency.atomic:
                return True
        except ConfigurationError:  # raised by the call
            continue
    return False


class _InMemory(SQLStore):
    """A store in memory, until an outbox asks for the transactions of the app's own database."""

    place: weakref.ref[_Place]

    def __init__(self, table: str) -> None:
        super().__init__("sqlite://", table=table)

    @property
    def engine(self) -> Engine:
        return self._app_s().engine  # type: ignore[attr-defined, no-any-return]

    def within(self, connection: Connection) -> SQLStore:
        return self._app_s().within(connection)  # type: ignore[attr-defined, no-any-return]

    def copy_to(self, path: Path) -> None:
        """Copy all rows to a file."""
        import sqlite3

        with (
            self._database.engine.connect() as connection,
            closing(sqlite3.connect(path)) as file,
        ):
            connection.connection.driver_connection.backup(file)  # type: ignore[union-attr]

    def _app_s(self) -> Store:
        place = self.place()
        assert place is not None, "it is used by its place's queue logs"
        return place.share()


class _Noting:
    """A store that notes which rows it inserts.

    Args:
        store: The store.
        inserted: The rows.
    """

    def __init__(self, store: Store, inserted: dict[MessageKey, None]) -> None:
        self._store = store
        self.inserted = inserted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __repr__(self) -> str:
        return repr(self._store)

    @property
    def undone_by_tests(self) -> bool:
        return getattr(self._store, "undone_by_tests", False)

    def record(self, message: NewMessage) -> Inserted | Duplicate:
        answer = self._store.record(message)
        if isinstance(answer, Inserted):
            self.inserted[message.key] = None
        return answer

    def record_all(self, messages: Sequence[NewMessage]) -> list[Inserted | Duplicate]:
        answers = self._store.record_all(messages)
        for message, answer in zip(messages, answers, strict=True):
            if isinstance(answer, Inserted):
                self.inserted[message.key] = None
        return answers

    def claim(self, message: NewMessage, *, adopt: Any = None, **how: Any) -> Claimed | NotClaimed:
        absent = []

        def insert() -> NewMessage:
            absent.append(True)
            record: NewMessage = message if adopt is None else adopt()
            return record

        answer = self._store.claim(message, adopt=insert, **how)
        if absent and isinstance(answer, Claimed):
            self.inserted[message.key] = None
        return answer

    def within(self, connection: Connection) -> _Noting:
        return _Noting(self._store.within(connection), self.inserted)  # type: ignore[attr-defined]

    def erase(self) -> None:
        """Delete the rows that were inserted, and close the store's own connections: a test may drop its database."""
        inserted = list(self.inserted)
        self.inserted.clear()
        if not inserted or not isinstance(self._store, SQLStore):
            return
        try:
            self._store.erase(inserted)
        except SchemaError:
            pass  # its table is gone, or its database
        except StoreError as error:
            logger.warning("%d rows of a test are left in the queue log: %s", len(inserted), error)
        self._store.close()
