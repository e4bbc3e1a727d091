"""An app of the library's next version: its table has two columns and an index that today's has not.

There is no such version yet; this one stands for whichever comes. Its code reads and writes the new columns as it does all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from celery import Celery, Task

from celery_idempotent.stores.sql import table as tables
from celery_idempotent.stores.sql.table import Version, _Index
from tests.support.apps import generic
from tests.support.ledger import Ledger

__all__ = ["CHANGES", "NEXT", "VERSIONS", "newer", "register"]

NEXT = Version(
    lambda: (
        sa.Column("tenant", sa.String(32)),
        sa.Column("weight", sa.Integer, nullable=False, server_default="1"),
    ),
    (_Index("tenant", ("tenant",), lambda table: table.c.tenant.is_not(None)),),
)

VERSIONS = (*tables.VERSIONS, NEXT)

#: What takes a table of this version to the next one.
CHANGES = [
    "add the column tenant to queue_log",
    "add the column weight to queue_log",
    "create the index queue_log_tenant",
]


@contextmanager
def newer() -> Iterator[None]:
    """Make the code in this process the next version's; a store keeps to the version that it was made by."""
    before = tables.VERSIONS
    tables.VERSIONS = VERSIONS
    try:
        yield
    finally:
        tables.VERSIONS = before


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks of ``generic``, in a process that is of the next version from here on."""
    tables.VERSIONS = VERSIONS
    generic.register(app, base=base, ledger=ledger)
