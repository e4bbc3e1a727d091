"""The ledger: one append-only file in which every task body notes what it did, whatever process it runs in.

It is the tests' witness, so it shares nothing with what is tested: no store, no broker, no lock. Each note is one ``write``
of one line to a file opened with ``O_APPEND``, which the kernel keeps whole among any number of writers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Entry", "Ledger"]

Event = Literal["start", "end", "raise"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One note.

    Attributes:
        event: ``start`` and ``end`` of a body; ``raise`` in place of ``end`` when an exception left it.
        task: Task name.
        task_id: Celery's id of the task.
        message_id: The ``message_id`` property of the delivery, if it had one.
        retries: Celery's retry count of the delivery.
        worker: The worker's host name; ``None`` outside a worker.
        pid: The process that ran the body.
        at: Wall clock, seconds since the epoch.
        detail: The exception's type for ``raise``; what a task adds, else.
    """

    event: Event
    task: str
    task_id: str | None
    message_id: str | None
    retries: int
    worker: str | None
    pid: int
    at: float
    detail: str | None = None


class Ledger:
    """A ledger in a file; the file appears with the first note."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def note(self, event: Event, task: Any, *, detail: str | None = None) -> None:
        """Append one note about a bound task's current request."""
        request = task.request
        entry = Entry(
            event=event,
            task=task.name,
            task_id=request.id,
            message_id=(request.properties or {}).get("message_id"),
            retries=request.retries or 0,
            worker=request.hostname,
            pid=os.getpid(),
            at=time.time(),
            detail=detail,
        )
        line = json.dumps(asdict(entry)).encode() + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            written = os.write(descriptor, line)
        finally:
            os.close(descriptor)
        assert written == len(line), "a note was cut short: the disk is full"

    @contextmanager
    def run(self, task: Any) -> Iterator[None]:
        """Note the start and the end of a body around the block."""
        self.note("start", task)
        try:
            yield
        except BaseException as error:
            self.note("raise", task, detail=type(error).__name__)
            raise
        self.note("end", task)

    def entries(
        self, event: Event | None = None, *, task: str | None = None, task_id: str | None = None
    ) -> list[Entry]:
        """Return the notes so far in the order in which they were written, filtered by the given arguments."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        # A line without its end is being written this moment.
        notes = [Entry(**json.loads(line)) for line in lines if line.endswith(b"\n")]
        return [
            note
            for note in notes
            if (event is None or note.event == event)
            and (task is None or note.task == task)
            and (task_id is None or note.task_id == task_id)
        ]

    def starts(self, task: str | None = None, *, task_id: str | None = None) -> list[Entry]:
        """How often, where and when bodies were entered."""
        return self.entries("start", task=task, task_id=task_id)

    def ends(self, task: str | None = None, *, task_id: str | None = None) -> list[Entry]:
        """How often, where and when bodies returned."""
        return self.entries("end", task=task, task_id=task_id)
