"""What the transactions of a run of chaos write: rows in the store's database, with no constraint against doubles.

The ledger says which bodies ran; this database says what was committed. In each row is the Celery id of the message that its transaction
sent, so that a caller who had no answer can look up whom to ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

__all__ = ["Effect", "EffectsDB", "Order", "Written"]


class _Base(DeclarativeBase):
    pass


class _Row:
    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(sa.String(200), index=True)
    sent: Mapped[str | None] = mapped_column(sa.String(200))


class Effect(_Row, _Base):
    """What an atomic body did."""

    __tablename__ = "effects"


class Order(_Row, _Base):
    """What a producer's transaction wrote, together with the message of its outbox."""

    __tablename__ = "orders"


@dataclass(frozen=True, slots=True)
class Written:
    """A row, as it was committed.

    Attributes:
        key: Of the step whose body, or of the sending whose transaction wrote it.
        sent: The Celery id of the message that this transaction sent, if it knew one.
    """

    key: str
    sent: str | None


class EffectsDB:
    """The tables, for everything but atomic bodies.

    Args:
        url: The store's.
        pooled: Whether to keep connections, as a process does that never forks.
    """

    def __init__(self, url: str, *, pooled: bool = False) -> None:
        # A pooler may stand before it, which prepared statements do not go through.
        arguments = {"prepare_threshold": None} if make_url(url).drivername == "postgresql+psycopg" else {}
        self._engine = sa.create_engine(url, poolclass=sa.QueuePool if pooled else sa.NullPool, connect_args=arguments)

    def create(self) -> None:
        """Make the tables."""
        _Base.metadata.create_all(self._engine)

    def session(self) -> Session:
        """Return an ordinary session, on connections of its own."""
        return Session(self._engine)

    def read(self, table: type[Effect | Order]) -> Sequence[Written]:
        """All rows that were committed."""
        with self.session() as session:
            return [Written(*row) for row in session.execute(sa.select(table.key, table.sent))]

    def close(self) -> None:
        """Close the connections that were kept."""
        self._engine.dispose()
