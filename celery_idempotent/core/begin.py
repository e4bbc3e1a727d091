"""Begin a transaction in the database itself, where the driver would put that off.

Python's driver for SQLite begins a transaction before the first statement that writes. What is read before is in no transaction. A savepoint
that is set before is a transaction itself: its release commits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["begin", "begin_before_savepoints"]


def begin(connection: Connection, *, at_once: bool = False) -> None:
    """Begin a connection's transaction in the database too, where the driver puts that off.

    Args:
        connection: In a transaction, of which nothing is written yet.
        at_once: Whether to wait for all others that write here and now, rather than to find out at the first write that what was
            read is out of date. Nothing may have been read yet. Of no effect where there is more than one writer at a time.
    """
    autocommit = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
    # SQLAlchemy calls what is in autocommit a transaction, too, and does not commit it.
    if connection.dialect.name != "sqlite" or autocommit:
        return
    begun = getattr(connection.connection.driver_connection, "in_transaction", True)
    if begun and at_once:  # by a listener of the engine's owner
        connection.exec_driver_sql("ROLLBACK")
    if at_once or not begun:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if at_once else "BEGIN")


def begin_before_savepoints(connection: Connection) -> None:
    """Have a savepoint of a connection always be one in a transaction; see :func:`begin`. Doing so again changes nothing."""
    from sqlalchemy import event

    if connection.dialect.name == "sqlite" and not event.contains(connection, "savepoint", _before_savepoint):
        event.listen(connection, "savepoint", _before_savepoint)


def _before_savepoint(connection: Connection, name: str | None) -> None:  # noqa: ARG001 - SQLAlchemy's signature
    begin(connection)
