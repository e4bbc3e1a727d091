"""An outbox in Django's own transaction, on PostgreSQL with psycopg 3."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from django.db import connection, transaction
from psycopg.pq import TransactionStatus
from sqlalchemy import Engine, NullPool, create_engine
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from celery_idempotent import outbox


class DjangoDialect(PGDialect_psycopg):
    """Uses a connection that only Django sets up, commits, rolls back and closes."""

    supports_statement_cache = True

    def on_connect(self) -> None:
        return None

    def do_nothing(self, dbapi_connection: Any) -> None:
        pass

    do_commit = do_rollback = do_close = do_terminate = do_nothing


registry.register("postgresql.django", __name__, DjangoDialect.__name__)


@cache
def engine() -> Engine:
    return create_engine(
        "postgresql+django://",
        creator=lambda: connection.connection,
        poolclass=NullPool,
        use_native_hstore=False,
    )


@contextmanager
def django_outbox() -> Iterator[None]:
    """``transaction.atomic()`` that records calls, and publishes them after it."""
    undone = False

    def watch(execute: Callable[..., Any], sql: str, *arguments: Any) -> Any:
        nonlocal undone
        undone = undone or sql.startswith("ROLLBACK TO")
        return execute(sql, *arguments)

    connection.ensure_connection()
    with (
        engine().connect() as shared,
        outbox(shared),
        transaction.atomic(durable=True),
        connection.execute_wrapper(watch),
    ):
        # Tell the outbox that Django has committed. Not after a savepoint was rolled
        # back: then the relay publishes what is there.
        transaction.on_commit(lambda: None if undone else shared.commit())
        yield
        if connection.connection.info.transaction_status is TransactionStatus.INERROR:
            raise transaction.TransactionManagementError(
                "an error was caught in the block, and nothing of it can be kept"
            )
