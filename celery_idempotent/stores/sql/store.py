"""The store: the port's verbs, each run on a connection."""

# ruff: noqa: D102 - the verbs are documented in the port

# Longer than most: every verb of the port, one line each.

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar

from sqlalchemy import URL, Connection, Engine, MetaData

from celery_idempotent.core.records import (
    Change,
    Claim,
    Claimed,
    Duplicate,
    Holder,
    Inserted,
    LogHealth,
    MessageKey,
    NewMessage,
    NoResultReason,
    NotClaimed,
    ProcessedStatus,
    Row,
    RowFilter,
    TaskCount,
)
from celery_idempotent.core.store import TransactionStatus
from celery_idempotent.errors import SchemaError, StoreError, StoreUnavailableError
from celery_idempotent.stores.sql import schema
from celery_idempotent.stores.sql.address import parse, refuse_driver
from celery_idempotent.stores.sql.admin import Admin
from celery_idempotent.stores.sql.claims import Claims
from celery_idempotent.stores.sql.columns import AT_ONCE, Old
from celery_idempotent.stores.sql.connection import Database
from celery_idempotent.stores.sql.dialects import Dialect, dialect_named
from celery_idempotent.stores.sql.migrations import newest, steps_to
from celery_idempotent.stores.sql.producer import Producer
from celery_idempotent.stores.sql.reading import Reading
from celery_idempotent.stores.sql.recovering import Recovering
from celery_idempotent.stores.sql.table import queue_log_table
from celery_idempotent.stores.sql.transitions import Transitions

if TYPE_CHECKING:
    from celery_idempotent.core.store.transactional import Surrounding

__all__ = ["SQLStore"]


class SQLStore:
    """The queue log in a table of PostgreSQL, MySQL, MariaDB or SQLite.

    Implements :class:`~celery_idempotent.core.store.TransactionalStore`.

    Safe between threads, greenlets and processes, and across forks: nothing is connected before the first verb, and each
    process connects for itself. Before a process's first verb the table is looked at; on SQLite it is made if missing.

    Args:
        url_or_engine: A URL, as for :func:`~celery_idempotent.stores.open_store`; or a SQLAlchemy engine of yours, which
            stays yours: it is never disposed of, except that after a fork its inherited pool is dropped (unclosed, by
            ``dispose(close=False)``). Atomic bodies run on its connections. The store's own statements run on others, which are made as it
            makes its own, by its creator and with its ``connect`` listeners, in a pool of the same size; they are closed with the store, and when the
            engine is disposed of. On SQLite, and with an engine that has no ``QueuePool``, they run on the engine's own. On MySQL and MariaDB an
            engine of yours ought to be in strict SQL mode.
        table: The table's name, or ``schema.name``.

    Raises:
        ConfigurationError: The URL is not valid, its driver is missing, or the database is of another kind.

    An in-memory SQLite database (``sqlite://``) lives and dies with its process and with :meth:`close`.
    """

    def __init__(self, url_or_engine: str | URL | Engine, *, table: str = "queue_log") -> None:
        target = url_or_engine if isinstance(url_or_engine, Engine) else parse(url_or_engine)
        if isinstance(target, Engine):
            refuse_driver(target.dialect.driver)
        dialect = dialect_named(target.dialect.name if isinstance(target, Engine) else target.get_backend_name())
        namespace, _, name = table.rpartition(".")
        self._table = queue_log_table(MetaData(), name, schema=namespace or None)
        self._dialect = dialect
        self._database = self._open(target, dialect, self._prepare)
        self._run = self._database.run
        self._producer = Producer(self._table, dialect)
        self._claims = Claims(self._table, dialect)
        self._transitions = Transitions(self._table)
        self._reading = Reading(self._table, dialect)
        self._recovering = Recovering(self._table, dialect)
        self._admin = Admin(self._table, dialect)
        self._in_transaction = False

    def _open(self, target: URL | Engine, dialect: Dialect, prepare: Callable[[Connection], None]) -> Database:
        return Database(target, dialect, prepare)

    def __repr__(self) -> str:
        return f"SQLStore({str(self._database)!r}, table={self._table.fullname!r})"

    @property
    def engine(self) -> Engine:
        """An engine for transactions of your own on the store's database: the one you gave, or one with its own pool.

        Opened lazily, per process; :meth:`close` disposes of the store's own.
        """
        return self._database.engine

    def within(self, connection: Connection) -> SQLStore:
        """Return this store with its verbs in a transaction of yours: what they write is committed, or not, by you.

        Args:
            connection: One of :attr:`engine`'s database, in a transaction.

        Raises:
            ConfigurationError: It is a connection to another kind of database.
            SchemaError: The table is not there; on SQLite it is made if missing.
        """
        joined = copy(self)
        joined._run = self._database.join(connection).run  # noqa: SLF001 - it is one of us
        joined._in_transaction = True  # noqa: SLF001
        return joined

    def recorded(self, keys: Sequence[MessageKey]) -> Mapping[MessageKey, str]:
        return self._run(lambda on, _: self._reading.task_ids(on, keys)) if keys else {}

    begins_before_body: ClassVar[bool] = False

    def surrounding(self) -> Surrounding | None:
        return None

    def watch(self, connection: Connection, note: Callable[[BaseException], None]) -> None:
        """Do nothing: SQLAlchemy makes every statement."""

    def transaction_status(self, connection: Connection) -> TransactionStatus:
        return self._dialect.transaction_status(connection.connection.driver_connection)

    def gave_way(self, error: BaseException) -> bool:
        return self._database.gave_way(error)

    def collided(self, error: BaseException) -> bool:
        return self._database.collided(error)

    # -- producer ------------------------------------------------------------------------------------------------------

    def record(self, message: NewMessage) -> Inserted | Duplicate:
        return self._run(
            lambda on, is_retry: self._producer.record(
                on, message, is_retry=is_retry, in_transaction=self._in_transaction
            )
        )

    def record_all(self, messages: Sequence[NewMessage]) -> list[Inserted | Duplicate]:
        answers: list[Inserted | Duplicate] = []
        for first in range(0, len(messages), AT_ONCE):
            some = messages[first : first + AT_ONCE]
            answers += self._run(
                lambda on, is_retry, some=some: self._producer.record_all(  # type: ignore[misc]
                    on, some, is_retry=is_retry, in_transaction=self._in_transaction
                )
            )
        return answers

    def withdraw(self, key: MessageKey, *, task_id: str) -> bool:
        return self._run(lambda on, is_retry: self._producer.withdraw(on, key, task_id=task_id, is_retry=is_retry))

    def resubmit(self, row: Row, message: NewMessage) -> bool:
        return self._run(lambda on, is_retry: self._producer.resubmit(on, row, message, is_retry=is_retry))

    def republish(self, row: Row) -> bool:
        return self._run(lambda on, is_retry: self._producer.republish(on, row, is_retry=is_retry))

    def count_duplicate(self, key: MessageKey) -> None:
        self._run(lambda on, _: self._producer.count_duplicate(on, key))

    # -- consumer ------------------------------------------------------------------------------------------------------

    def claim(
        self,
        message: NewMessage,
        *,
        worker: str,
        lease: float,
        grace: float,
        adopt: Callable[[], NewMessage] | None = None,
    ) -> Claimed | NotClaimed:
        return self._run(
            lambda on, is_retry: self._claims.claim(
                on, message, worker=worker, lease=lease, grace=grace, adopt=adopt, is_retry=is_retry
            )
        )

    def take_over(self, row: Row, *, task_id: str, worker: str, lease: float, attempt: int) -> Claimed | None:
        return self._run(
            lambda on, is_retry: self._claims.take_over(
                on, row, task_id=task_id, worker=worker, lease=lease, attempt=attempt, is_retry=is_retry
            )
        )

    def renew(self, holders: Sequence[Holder], *, lease: float) -> list[Holder]:
        return self._run(lambda on, _: self._claims.renew(on, holders, lease=lease)) if holders else []

    def checkpoint(self, claim: Claim, *, result: bytes | None, lease: float | None = None) -> bool:
        return self._run(lambda on, _: self._transitions.checkpoint(on, claim, result=result, lease=lease))

    def complete(
        self, claim: Claim, *, result: bytes | None, note: NoResultReason | None = None, unique_for: float | None = None
    ) -> bool:
        return self._run(
            lambda on, _: self._transitions.complete(on, claim, result=result, note=note, unique_for=unique_for)
        )

    def fail(self, holder: Holder, *, error: str, unique_for: float | None = None) -> bool:
        return self._saying(
            error,
            lambda on, text, is_retry: self._transitions.fail(
                on, holder, error=text, unique_for=unique_for, is_retry=is_retry
            ),
        )

    def retry(self, holder: Holder, message: NewMessage) -> bool:
        return self._run(lambda on, is_retry: self._transitions.retry(on, holder, message, is_retry=is_retry))

    def release(self, holder: Holder) -> bool:
        return self._run(lambda on, is_retry: self._transitions.release(on, holder, is_retry=is_retry))

    def expire(self, holder: Holder) -> bool:
        return self._run(lambda on, _: self._transitions.expire(on, holder))

    def abandon(self, row: Row, *, error: str, unique_for: float | None = None) -> bool:
        return self._saying(
            error,
            lambda on, text, is_retry: self._transitions.abandon(
                on, row, error=text, unique_for=unique_for, is_retry=is_retry
            ),
        )

    def cancel(self, key: MessageKey, *, task_id: str, error: str, unique_for: float | None = None) -> bool:
        return self._saying(
            error,
            lambda on, text, is_retry: self._transitions.cancel(
                on, key, task_id=task_id, error=text, unique_for=unique_for, is_retry=is_retry
            ),
        )

    def forbid(self, row: Row, *, error: str) -> bool:
        return self._run(lambda on, _: self._transitions.forbid(on, row, error=error))

    def _saying(self, error: str, write: Callable[[Connection, str, bool], bool]) -> bool:
        """Write an ending with its error, in ASCII if the database has no characters for it: an ending is never refused for that."""
        try:
            return self._run(lambda on, is_retry: write(on, error, is_retry))
        except (StoreUnavailableError, SchemaError):
            raise
        except StoreError:
            plain = error.encode("ascii", "backslashreplace").decode()
            if plain == error:
                raise
            return self._run(lambda on, is_retry: write(on, plain, is_retry))

    # -- recovery ------------------------------------------------------------------------------------------------------

    def lapsed(self, *, again_after: float, limit: int, tasks: Collection[str] | None = None) -> list[Row]:
        return self._run(lambda on, _: self._recovering.lapsed(on, again_after=again_after, limit=limit, tasks=tasks))

    def waiting(
        self,
        *,
        older_than: float,
        limit: int,
        before: Mapping[str, datetime] | None = None,
        tasks: Collection[str] | None = None,
    ) -> list[Row]:
        return self._run(
            lambda on, _: self._recovering.waiting(on, older_than=older_than, limit=limit, before=before, tasks=tasks)
        )

    def unsent(self, *, limit: int, tasks: Collection[str] | None = None) -> list[Row]:
        return self._run(lambda on, _: self._recovering.unsent(on, limit=limit, tasks=tasks))

    def relay(self, row: Row, *, lease: float) -> bool:
        return self._run(lambda on, _: self._recovering.relay(on, row, lease=lease))

    def relayed(self, keys: Sequence[MessageKey], *, published: bool) -> None:
        if keys:
            self._run(lambda on, _: self._recovering.relayed(on, keys, published=published))

    def not_published(self, key: MessageKey, *, token: int) -> None:
        self._run(lambda on, _: self._recovering.not_published(on, key, token=token))

    def purge(
        self,
        *,
        older_than: float,
        limit: int,
        failures_older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        old = Old(older_than, failures_older_than, task_name, processed_status)
        return self._run(lambda on, _: self._recovering.purge(on, old, limit=limit))

    def newest(self, *, limit: int) -> list[Row]:
        return self._run(lambda on, _: self._reading.newest(on, limit=limit))

    def find_all(self, keys: Collection[MessageKey]) -> list[Row]:
        return self._run(lambda on, _: self._reading.find_all(on, keys)) if keys else []

    # -- operators -----------------------------------------------------------------------------------------------------

    def find(self, key: MessageKey) -> Row | None:
        return self._run(lambda on, _: self._reading.find(on, key))

    def rows(self, where: RowFilter) -> Iterator[Row]:
        return iter(self._run(lambda on, _: self._reading.rows(on, where), patient=True))

    def counts(self) -> list[TaskCount]:
        return self._run(lambda on, _: self._reading.counts(on), patient=True)

    def forget(self, row: Row) -> bool:
        return self._run(lambda on, is_retry: self._admin.forget(on, row, is_retry=is_retry))

    def purgeable(
        self,
        *,
        older_than: float,
        failures_older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        old = Old(older_than, failures_older_than, task_name, processed_status)
        return self._run(lambda on, _: self._admin.purgeable(on, old), patient=True)

    def condition(self) -> LogHealth:
        return self._run(lambda on, _: self._admin.condition(on), prepared=False, patient=True)

    def configuration(self) -> Mapping[str, str]:
        if not self._database.exists():
            return {"file": str(self.engine.url.database)}
        told = self._run(
            lambda on, _: {name: str(value) for name, value in on.execute(self._dialect.configuration)}, prepared=False
        )
        return {**told, **self._database.of_bodies()}

    # -- life cycle ----------------------------------------------------------------------------------------------------

    def init(self, *, before: Callable[[Change], None] | None = None) -> bool:
        return self._run(lambda on, _: schema.create(on, self._table, before), prepared=False, patient=True)

    def outstanding(self) -> list[Change]:
        if not self._database.exists():
            return [step.change(self.engine.dialect) for step in steps_to(newest(), self._table.name, None, None)]
        return self._run(lambda on, _: schema.outstanding(on, self._table), prepared=False)

    def check(self) -> None:
        self._run(lambda on, _: self._prepare(on), prepared=False)

    def inspect(self) -> bool:
        if not self._database.exists():
            return False
        return self._run(lambda on, _: self._inspect(on), prepared=False)

    def close(self) -> None:
        self._database.close()

    def _prepare(self, connection: Connection) -> None:
        if self._dialect.creates_table:
            schema.create(connection, self._table)
        else:
            schema.verify(connection, self._table)

    def _inspect(self, connection: Connection) -> bool:
        if self._dialect.creates_table and not schema.is_there(connection, self._table):
            return False
        schema.verify(connection, self._table)
        return True
