"""What really happened, in tables that are only ever added to.

Nothing here is unique but the row number: a table that refused a second message to a customer would hide that it was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Executable,
    Float,
    Integer,
    MetaData,
    NullPool,
    String,
    Table,
    create_engine,
    func,
    select,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

metadata = MetaData()


def table(name: str, *columns: Column[Any]) -> Table:
    """Return a table about requests."""
    return Table(
        f"loan_{name}",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("request_id", String(64), nullable=False),
        *columns,
        Column("at", DateTime, server_default=func.now(), nullable=False),
    )


#: A customer asked for a loan. Written by the web server.
requests = table("requests", Column("customer", String(64)), Column("amount", Integer))
#: The check of a request began: every institution is to be asked.
checks = table("checks")
#: An institution was asked. ``answer`` is ``offer``, ``refused``, ``unavailable`` (and it is asked again) or ``given up``.
enquiries = table(
    "enquiries",
    Column("institution", String(64)),
    Column("attempt", Integer),
    Column("answer", String(16)),
    Column("rate", Float),
)
#: All answers are there, and the best was chosen.
decisions = table("decisions", Column("offers", Integer))
#: The app's record of what its customers were told.
messages = table("messages", Column("customer", String(64)), Column("text", String(255)))

# Two that belong to others, and are in this database only because all of it is a pretence: no transaction of the app's reaches them.

#: The SMS gateway was handed a text. It delivers one for each key.
texts = table("texts", Column("idempotency_key", String(255)))
#: A filing was processed at the outside agency, which knows no keys.
filings = table("filings", Column("amount", Integer), Column("rate", Float))


class Ledger:
    """The tables at a database URL."""

    def __init__(self, url: str) -> None:
        # No pool: a worker's children must not share a connection that was opened before the fork.
        waiting = {"timeout": 30} if url.startswith("sqlite") else {}
        self._engine = create_engine(url, poolclass=NullPool, connect_args=waiting)

    def create(self) -> None:
        """Create the tables that are not there."""
        with self._engine.begin() as connection:
            if connection.dialect.name == "sqlite":
                # Readers and the writer do not wait for each other.
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            metadata.create_all(connection)

    def append(self, table: Table, **values: Any) -> None:
        """Add a row, and commit."""
        with self.begin() as connection:
            connection.execute(table.insert().values(values))

    def begin(self) -> AbstractContextManager[Connection]:
        """Return a transaction that commits at the end of its block."""
        return self._engine.begin()

    def session(self) -> Session:
        """Return a session; what it does not commit is rolled back when it is closed."""
        return Session(self._engine)

    def count(self, table: Table, prefix: str, *by: str) -> Counter[tuple[str, ...]]:
        """How many rows there are for each value of some columns, of the requests whose id begins so."""
        chosen = table.c.request_id.startswith(prefix, autoescape=True)
        columns = [table.c[name] for name in by]
        counted = self.read(select(*columns, func.count()).where(chosen).group_by(*columns))
        return Counter({tuple(map(str, row[:-1])): int(row[-1]) for row in counted})

    def read(self, query: Executable, **values: Any) -> Sequence[Any]:
        """Return what a query finds; it may be about another table of the same database."""
        with self._engine.connect() as connection:
            return connection.execute(query, values).all()

    def at_rest(self) -> bool:
        """Return whether nobody is in the middle of a write; a server ends by itself what it was sent, a file does not."""
        if self._engine.dialect.name != "sqlite":
            return True
        with self._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout=0")
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            except OperationalError:
                return False
            connection.rollback()
            return True


if __name__ == "__main__":
    from example_project.settings import Settings

    Ledger(Settings.from_environ().store).create()
