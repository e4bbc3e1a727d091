"""What atomic tasks do in the tests: rows of a table in the store's database, which nothing keeps from being there twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["Effect", "Effects", "add_to"]


class _Base(DeclarativeBase):
    pass


class Effect(_Base):
    """One effect, by the name that a test gave it."""

    __tablename__ = "effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(200), index=True)  # or MariaDB would lock every row to find one
    value: Mapped[int] = mapped_column(default=0)


class Effects:
    """The table, as a test sees it: on connections of its own.

    Args:
        url: The store's.
    """

    def __init__(self, url: str) -> None:
        timeout = {"timeout": 30.0} if url.startswith("sqlite") else {}
        self.engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=timeout)
        _Base.metadata.create_all(self.engine)

    def names(self) -> list[str]:
        """Return the names of all that took effect, in no order that matters."""
        with self.engine.connect() as connection:
            return sorted(connection.scalars(sa.select(Effect.name)))

    def count(self, name: str) -> int:
        """How often it took effect."""
        return self.names().count(name)

    def put(self, *names: str) -> None:
        """Have some there from the beginning."""
        with self.engine.begin() as connection:
            connection.execute(sa.insert(Effect), [{"name": name, "value": 0} for name in names])

    def value(self, name: str) -> int:
        """Return the value of the only one of its name."""
        with self.engine.connect() as connection:
            return int(connection.scalars(sa.select(Effect.value).where(Effect.name == name)).one())

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Yield a connection in another transaction."""
        with self.engine.begin() as connection:
            yield connection

    def close(self) -> None:
        self.engine.dispose()


def add_to(name: str) -> sa.Update:
    """Return the statement that adds one to a value."""
    return sa.update(Effect).where(Effect.name == name).values(value=Effect.value + 1)
