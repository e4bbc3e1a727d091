"""What the tasks make do with under ``LOAN_BASE=plain``: Celery's own task class, and a transaction."""

from __future__ import annotations

from typing import Any

from celery import Task
from sqlalchemy import Connection

from example_project.ledger import Ledger
from example_project.settings import Settings

book = Ledger(Settings.from_environ().store)


class PlainTask(Task):  # type: ignore[misc]
    """The stock task, except that a body with ``atomic=True`` finds a ``connection`` here too, as anybody would write it.

    It commits when the body has returned. What the body sends is sent at once, and that it is done the broker learns later.
    """

    abstract = True
    atomic = False
    #: Of the body that runs; a process runs one at a time.
    connection: Connection

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.atomic:
            return super().__call__(*args, **kwargs)
        with book.begin() as self.connection:
            return super().__call__(*args, **kwargs)
