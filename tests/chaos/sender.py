"""The producer of a run of chaos, a process of its own that is killed like the rest: ``python -m tests.chaos.sender``.

A sender that is started again goes on where its journal ends, and calls again what may or may not have been sent: as does a caller
that had no answer. Nobody but the library keeps that from being sent twice.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from celery import Celery
from celery.result import AsyncResult, GroupResult, ResultBase
from kombu.exceptions import OperationalError

from celery_idempotent import StoreError
from tests.chaos.plan import Sending, make_plan
from tests.chaos.tasks import signature
from tests.support.apps import AppSpec

__all__ = ["Orders", "Sent", "journal"]

logger = logging.getLogger(__name__)

#: Bodies that may be under way before the sender waits a little for each further one.
BACKLOG = 40


@dataclass(frozen=True, slots=True)
class Orders:
    """What a sender is told.

    Attributes:
        seed, tasks, kills: What its plan is made of.
        directory: Where its journal is, and the file that says how far it may go.
    """

    seed: int
    tasks: int
    kills: int
    directory: str

    VARIABLE = "CELERY_IDEMPOTENT_CHAOS_SENDER"

    def environment(self) -> dict[str, str]:
        """What the sender needs to find in its environment."""
        return {self.VARIABLE: json.dumps([self.seed, self.tasks, self.kills, self.directory])}

    @classmethod
    def from_environment(cls) -> Self:
        """What :meth:`environment` passed on."""
        return cls(*json.loads(os.environ[cls.VARIABLE]))

    @property
    def journal(self) -> Path:
        """Where each sending is noted."""
        return Path(self.directory) / "sent"

    @property
    def limit(self) -> Path:
        """Holds the number of sendings that may have been sent by now."""
        return Path(self.directory) / "limit"


@dataclass(frozen=True, slots=True)
class Sent:
    """A line of the journal.

    Attributes:
        number: Of the sending.
        results: Task id and key of each step whose id the caller knows.
        errors: How many calls failed before one was taken.
    """

    number: int
    results: list[tuple[str, str]]
    errors: int


def journal(path: Path) -> list[Sent]:
    """What was sent, in order; a line that was cut short by a kill is none."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    notes = []
    for line in lines:
        try:
            number, results, errors = json.loads(line)
        except ValueError:
            continue
        notes.append(Sent(number, [(task_id, key) for task_id, key in results], errors))
    return notes


def main() -> None:
    orders = Orders.from_environment()
    spec = AppSpec.from_environment(os.environ)
    app = spec.build()
    plan = make_plan(orders.seed, tasks=orders.tasks, kills=orders.kills)
    sent = {note.number for note in journal(orders.journal)}
    ended = _Ended(Path(spec.ledger))
    descriptor = os.open(orders.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    bodies = 0
    for sending in plan.sendings:
        bodies += sum(step.retries + 1 for step in sending.steps())
        if sending.number in sent:
            continue
        while int(orders.limit.read_text() or 0) <= sending.number:
            time.sleep(0.02)
        if bodies - ended.count() > BACKLOG:
            time.sleep(0.15)  # what a variant has lost never ends, so this must not wait until it has
        results, errors = _send(app, sending)
        # On a line of its own, even where a line before was cut short.
        os.write(descriptor, b"\n" + json.dumps([sending.number, results, errors]).encode() + b"\n")
    app.close()


def _send(app: Celery, sending: Sending) -> tuple[list[tuple[str, str]], int]:
    """Call until a call was taken, and once more when the plan says so."""
    results: list[tuple[str, str]] = []
    errors, calls = 0, 2 if sending.again else 1
    while calls:
        try:
            result = signature(app, sending).apply_async()
        except (OperationalError, StoreError, OSError) as error:
            errors += 1
            logger.warning("%s: %r", sending.key, error)
            time.sleep(0.3)
            continue
        except Exception as error:  # noqa: BLE001 - how other packages say that it was sent already
            logger.warning("%s was refused: %r", sending.key, error)
            result = None
        calls -= 1
        if result is not None:
            results += _results(result, sending)
    return results, errors


def _results(result: Any, sending: Sending) -> list[tuple[str, str]]:
    """Task id and key of what the caller can ask for."""
    keys = [step.key for step in sending.steps()]
    ids: list[str] = []
    node: ResultBase | None = result
    while node is not None:
        found = [child.id for child in node.results] if isinstance(node, GroupResult) else []
        ids = (found or ([node.id] if isinstance(node, AsyncResult) else [])) + ids
        node = node.parent
    # Some packages answer a call that they refuse with a result that has no id.
    return [(task_id, key) for task_id, key in zip(ids, keys, strict=False) if task_id]


class _Ended:
    """Counts the bodies that have ended, by reading what the ledger has got since."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._count = 0

    def count(self) -> int:
        try:
            with self._path.open("rb") as ledger:
                ledger.seek(self._position)
                data = ledger.read()
        except FileNotFoundError:
            return 0
        self._position += len(data)
        self._count += data.count(b'"event": "end"') + data.count(b'"event": "raise"')
        return self._count


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s")
    main()
