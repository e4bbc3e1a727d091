"""Make a method a verb of the store: run it on a connection, and repeat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Executable, Table

from celery_idempotent.core.records import MessageKey, Row
from celery_idempotent.stores.sql.columns import Lookup
from celery_idempotent.stores.sql.connection import Attempt, Database

__all__ = ["ROUNDS", "Verbs", "verb", "wrote"]

S = TypeVar("S", bound="Verbs")
P = ParamSpec("P")
T = TypeVar("T")

#: How often a verb of several statements starts over because the row changed between two of them. Each time another process made
#: progress, so this many in a row mean that something is wrong.
ROUNDS = 20


class Verbs:
    """The base of each role's verbs: the table, and the database.

    Args:
        table: The queue log.
        database: It gives each attempt at a verb a connection.
    """

    def __init__(self, table: Table, database: Database) -> None:
        self._table = table
        self._database = database
        self._dialect = database.dialect
        self._run = database.run
        self._read = Lookup(table)

    def _shows(self, on: Attempt, key: MessageKey, took_effect: Callable[[Row], bool]) -> bool:
        """Read the row, and return whether it shows that an earlier attempt took effect."""
        row = self._read(on.connection, key)
        return row is not None and took_effect(row)


def verb(method: Callable[Concatenate[S, Attempt, P], T]) -> Callable[Concatenate[S, P], T]:
    """Give a method an attempt, which its callers do not pass, and repeat it if that can help.

    If the connection broke, ``on.is_retry`` is true on the repeat: the first attempt may have taken effect.
    """

    @wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(lambda on: method(self, on, *args, **kwargs))

    del run.__wrapped__  # it has a parameter that callers do not pass
    return run


def wrote(on: Attempt, statement: Executable, parameters: Mapping[str, Any]) -> bool:
    """Execute a statement. Return whether it found a row that met its conditions."""
    return on.connection.execute(statement, parameters).rowcount > 0
