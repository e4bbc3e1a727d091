"""An app of the library's next version: its table has two columns and an index that today's has not.

There is no such version yet; this one stands for whichever comes. Its code reads and writes the new columns as it does all others.
"""

from __future__ import annotations

import sqlalchemy as sa
from celery import Celery, Task

from celery_idempotent.stores.sql import table as tables
from celery_idempotent.stores.sql.table import Version, _Index
from tests.support.apps import generic
from tests.support.ledger import Ledger

__all__ = ["NEXT", "VERSIONS", "register"]

NEXT = Version(
    len(tables.VERSIONS) + 1,
    lambda: (
        sa.Column("tenant", sa.String(32)),
        sa.Column("weight", sa.Integer, nullable=False, server_default="1"),
    ),
    (_Index("tenant", ("tenant",), lambda table: table.c.tenant.is_not(None)),),
)

VERSIONS = (*tables.VERSIONS, NEXT)


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks of ``generic``, in a process that is of the next version from here on."""
    tables.VERSIONS = VERSIONS
    generic.register(app, base=base, ledger=ledger)
