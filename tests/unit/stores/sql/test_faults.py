"""What an error of a database means for the transaction that met it."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError, OperationalError

from celery_idempotent import SQLStore


class _PostgreSQLError(Exception):
    def __init__(self, sqlstate: str) -> None:
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


def postgresql(state: str) -> DBAPIError:
    return OperationalError("UPDATE", None, _PostgreSQLError(state))


def mysql(code: int) -> DBAPIError:
    return OperationalError("UPDATE", None, Exception(code, "no"))


def sqlite(text: str) -> DBAPIError:
    return OperationalError("UPDATE", None, Exception(text))


POSTGRESQL, MYSQL, SQLITE = "postgresql://localhost/shop", "mysql://localhost/shop", "sqlite:///shop.db"


@pytest.mark.parametrize(
    ("url", "error", "gave_way", "collided"),
    [
        (POSTGRESQL, postgresql("40001"), True, True),  # serialization_failure
        (POSTGRESQL, postgresql("40P01"), True, True),  # deadlock_detected
        (POSTGRESQL, postgresql("55P03"), True, True),  # lock_timeout
        (POSTGRESQL, postgresql("25006"), True, False),  # read-only
        (POSTGRESQL, postgresql("53300"), True, False),  # too many connections
        (POSTGRESQL, postgresql("57014"), False, False),  # statement_timeout: the statement's own affair
        (POSTGRESQL, postgresql("42P01"), False, False),  # no such table
        (MYSQL, mysql(1205), True, True),  # lock wait timeout
        (MYSQL, mysql(1213), True, True),  # deadlock
        (MYSQL, mysql(1020), True, True),  # changed since the snapshot
        (MYSQL, mysql(1040), True, False),  # too many connections
        (MYSQL, mysql(1290), True, False),  # read-only
        (MYSQL, mysql(3024), False, False),  # max_execution_time
        (MYSQL, mysql(1969), False, False),  # max_statement_time
        (SQLITE, sqlite("database is locked"), True, True),
        (SQLITE, sqlite("attempt to write a readonly database"), True, False),
        (SQLITE, sqlite("no such table: effects"), False, False),
    ],
)
def test_conflicts_and_collisions_are_recognized(url: str, error: DBAPIError, gave_way: bool, collided: bool) -> None:
    store = SQLStore(url)
    assert (store.gave_way(error), store.collided(error)) == (gave_way, collided)
