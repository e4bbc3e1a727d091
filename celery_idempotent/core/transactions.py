"""Refuse transactions in which no message can be recorded or completed: on a store without them, or in autocommit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from celery_idempotent.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import Session, scoped_session, sessionmaker

    from celery_idempotent.core.store import Store, TransactionalStore

    #: What makes the sessions of atomic bodies.
    SessionFactory = sessionmaker[Any] | scoped_session[Any] | Callable[..., Session]

__all__ = ["refuse_autocommit", "transactional", "with_transactions"]


def with_transactions(store: Store, what: str = "atomic=True") -> TransactionalStore:
    """Return the store, which has to be of a kind with transactions. Opens nothing, so that each call of a producer can ask.

    Args:
        store: The store.
        what: What needs it, for the error.

    Raises:
        ConfigurationError: It has none.
    """
    if not callable(getattr(store, "within", None)):
        raise ConfigurationError(
            f"{what} needs a store with transactions, such as SQLStore; {type(store).__name__} has none: "
            f"leave it out, and make what your code writes itself idempotent"
        )
    return cast("TransactionalStore", store)


def transactional(store: Store, what: str = "atomic=True") -> TransactionalStore:
    """Return the store, which has to be one with transactions for its users.

    Args:
        store: The store.
        what: What needs it, for the error.

    Raises:
        ConfigurationError: It has none, or is one connection.
    """
    store = with_transactions(store, what)
    if _is_one_connection(store.engine):
        raise ConfigurationError(
            f"{what} needs a database that two connections can share, and an in-memory SQLite is one connection; use a file"
        )
    return store


def refuse_autocommit(connection: Connection, what: str) -> None:
    """Refuse a connection whose statements each commit.

    Raises:
        ConfigurationError: It is one.
    """
    level = connection.get_execution_options().get("isolation_level")
    if level is None:  # what the engine was created with, which nothing public tells without asking the server
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    if str(level).upper() == "AUTOCOMMIT":
        raise ConfigurationError(what)


def _is_one_connection(engine: Engine) -> bool:
    from sqlalchemy.pool import SingletonThreadPool, StaticPool

    return isinstance(engine.pool, SingletonThreadPool | StaticPool)
