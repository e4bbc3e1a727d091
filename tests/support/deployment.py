"""An app with its queue log, and what its tasks did: for tests that send messages and look at their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

from celery import Celery
from celery.result import AsyncResult

from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.queue_log import QueueLog
from tests.support.apps import AppSpec
from tests.support.ledger import Entry, Ledger
from tests.support.waiting import TIMEOUT, wait_until

__all__ = ["Deployment", "unique"]

#: A message, by its id; or by the result of its call, where it was given no id of its own.
Message: TypeAlias = "str | AsyncResult[Any]"


def unique(what: str = "m") -> str:
    """Return a message id, or any other name, that no other test uses."""
    return f"{what}-{uuid4().hex[:12]}"


@dataclass
class Deployment:
    """An app, its queue log and its ledger.

    Attributes:
        spec: The app's description; its workers are built from the same.
        app: The app, in the test's process.
    """

    spec: AppSpec
    app: Celery

    @property
    def ledger(self) -> Ledger:
        """Where its tasks note what they do."""
        return Ledger(self.spec.ledger)

    def path(self, what: str = "file") -> str:
        """Return the path of a file that does not exist yet: a gate, a flag."""
        return str(self.ledger.path.parent / unique(what))

    def gate(self) -> Path:
        """Return a file that does not exist yet; bodies wait for it."""
        return Path(self.path("gate"))

    def task(self, name: str) -> Any:
        """Return a task of the app."""
        return self.app.tasks[name]

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        """Call a task."""
        result: AsyncResult[Any] = self.task(task).apply_async(args, **options)
        return result

    def find(self, task: str, message: Message) -> Row | None:
        """Return the row of a message, if there is one."""
        row: Row | None = QueueLog.of(self.app).store.find(MessageKey(_id(message), task))
        return row

    def row(self, task: str, message: Message) -> Row:
        """Return the row of a message."""
        row = self.find(task, message)
        assert row is not None, f"no row for {task}[{_id(message)}]"
        return row

    def wait_for_row(
        self, task: str, message: Message, condition: Callable[[Row], bool], *, timeout: float = TIMEOUT
    ) -> Row:
        """Wait until the row of a message meets a condition."""

        def as_wanted() -> Row | None:
            row = self.find(task, message)
            return row if row is not None and condition(row) else None

        return wait_until(as_wanted, timeout=timeout, describe=lambda: f"the row {self.find(task, message)}")

    def wait_until_done(self, task: str, message: Message, *, duplicates: int = 0, timeout: float = TIMEOUT) -> Row:
        """Wait until a message is done and at least so many duplicates of it were counted."""
        return self.wait_for_row(
            task,
            message,
            lambda row: row.status is Status.DONE and row.duplicates >= duplicates,
            timeout=timeout,
        )

    def assert_done(
        self, task: str, message: Message, outcome: ProcessedStatus, *, starts: int, token: int, duplicates: int = 0
    ) -> None:
        """Wait until a message is done, and check its row and how often its body was started."""
        row = self.wait_until_done(task, message, duplicates=duplicates)
        found = (row.processed_status, row.token, len(self.starts(task, message)))
        assert found == (outcome, token, starts), f"{row}; {self.starts(task, message)}"
        assert not duplicates or row.duplicates == duplicates

    def starts(self, task: str, message: Message) -> list[Entry]:
        """Return the starts of a task's body for a message."""
        return [note for note in self.ledger.starts(task) if _id(message) in {note.message_id, note.task_id}]

    def wait_for_starts(self, task: str, message: Message, count: int = 1) -> list[Entry]:
        """Wait for so many starts, and return them."""
        return wait_until(
            lambda: starts if len(starts := self.starts(task, message)) >= count else None,
            describe=lambda: f"{count} start(s) of {task}[{_id(message)}]: {self.ledger.entries()}",
        )


def _id(message: Message) -> str:
    return message if isinstance(message, str) else str(message.id)
