"""What really happened, in tables that are only ever added to.

Nothing here is unique but the row number: a table that refused a second message to a customer would hide that it was sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    Column,
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

metadata = MetaData()


def table(name: str, *columns: Column[Any]) -> Table:
    """A table about requests."""
    return Table(
        f"loan_{name}",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("request_id", String(64), nullable=False),
        *columns,
        Column("at", DateTime, server_default=func.now(), nullable=False),
    )


#: A customer's question reached the app.
requests = table("requests", Column("customer", String(64)), Column("amount", Integer))
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
#: A message went to the customer.
messages = table("messages", Column("customer", String(64)), Column("text", String(255)))
#: A filing was processed at the outside agency.
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
        with self._engine.begin() as connection:
            connection.execute(table.insert().values(values))

    def count(self, table: Table, prefix: str, *by: str) -> Counter[tuple[str, ...]]:
        """How many rows there are for each value of some columns, of the requests whose id begins so."""
        chosen = table.c.request_id.startswith(prefix, autoescape=True)
        columns = [table.c[name] for name in by]
        counted = self.read(select(*columns, func.count()).where(chosen).group_by(*columns))
        return Counter({tuple(map(str, row[:-1])): int(row[-1]) for row in counted})

    def read(self, query: Executable, **values: Any) -> Sequence[Any]:
        """What a query finds; it may be about another table of the same database."""
        with self._engine.connect() as connection:
            return connection.execute(query, values).all()

    def at_rest(self) -> bool:
        """Whether nobody is in the middle of a write; a server ends by itself what it was sent, a file does not."""
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
