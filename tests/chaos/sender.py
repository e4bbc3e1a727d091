"""The producer of a run of chaos, a process of its own that is killed like the rest: ``python -m tests.chaos.sender``.

A sender that is started again goes on where its journal ends, and calls again what may or may not have been sent: as does a caller
that had no answer. Nobody but the library keeps that from being sent twice. What it sends by an outbox it looks up in its own orders
first, as one does that has them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Self

from celery import Celery
from celery.result import AsyncResult, GroupResult, ResultBase
from django.db import Error as DjangoError
from kombu.exceptions import OperationalError
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from celery_idempotent import StoreError, outbox
from tests.chaos.effects_db import EffectsDB, Order
from tests.chaos.plan import Sending, make_plan
from tests.chaos.tasks import EFFECTS_DB, call_by_name, signature
from tests.chaos.variants import Variant
from tests.support import orm
from tests.support.apps import AppSpec

__all__ = ["Orders", "Sent", "journal"]

logger = logging.getLogger(__name__)

#: Bodies that may be under way before the sender waits a little for each further one.
BACKLOG = 40

#: How often a call is made again whose message is there without its order: the commit may still be under way.
DOUBTS = 20


@dataclass(frozen=True, slots=True)
class Orders:
    """What a sender gets back.

    Attributes:
        seed, tasks, kills, transactions: What its plan is made of.
        directory: Where its journal is, and the file that says how far it may go.
    """

    seed: int
    tasks: int
    kills: int
    transactions: bool
    directory: str

    VARIABLE = "CELERY_IDEMPOTENT_CHAOS_SENDER"

    def environment(self) -> dict[str, str]:
        """Return what the sender needs to find in its environment."""
        return {self.VARIABLE: json.dumps(astuple(self))}

    @classmethod
    def from_environment(cls) -> Self:
        """Return what :meth:`environment` passed on."""
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
    """Return what was sent, in order; a line that was cut short by a kill is none."""
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
    plan = make_plan(orders.seed, tasks=orders.tasks, kills=orders.kills, transactions=orders.transactions)
    sent = {note.number for note in journal(orders.journal)}
    ended = _Ended(Path(spec.ledger))
    effects_db = EffectsDB(app.conf[EFFECTS_DB], pooled=True)
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
        results, errors = _send(app, effects_db, sending)
        # On a line of its own, even where a line before was cut short.
        os.write(descriptor, b"\n" + json.dumps([sending.number, results, errors]).encode() + b"\n")
    effects_db.close()
    app.close()


class _InDoubtError(Exception):
    """The message is there, and the order is not."""


def _send(app: Celery, effects_db: EffectsDB, sending: Sending) -> tuple[list[tuple[str, str]], int]:
    """Call until a call was taken, and once more when the plan says so."""
    results: list[tuple[str, str]] = []
    errors, doubts, calls = 0, 0, 2 if sending.again else 1
    while calls:
        try:
            if sending.kind == "outbox":
                again = calls < 2 and sending.again
                if orm.is_used():
                    result = _order_in_django(app, sending, again=again)
                else:
                    result = _order(app, effects_db, sending, again=again)
            elif sending.kind == "by_name" or (calls < 2 and sending.copied_by_name):
                result = call_by_name(app, sending)
            else:
                result = signature(app, sending).apply_async()
        except (OperationalError, StoreError, DBAPIError, DjangoError, OSError, _InDoubtError) as error:
            errors += 1
            doubts += isinstance(error, _InDoubtError)
            if doubts > DOUBTS:
                break  # the audit sees what became of it
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


def _order(app: Celery, effects_db: EffectsDB, sending: Sending, *, again: bool) -> Any:
    """Write an order and call its task in one transaction, unless the order is there already: its message is there then too.

    Args:
        app: The app.
        effects_db: Where the order goes.
        sending: What is called.
        again: Whether to call although it is there.

    Returns:
        The result, of whichever call it was.

    Raises:
        _InDoubtError: The order is not there, but its message is.
    """
    with effects_db.session() as session:
        sent = session.scalar(select(Order.sent).where(Order.key == sending.key))
        if not Variant.of_this_process().guarded:
            return _order_and_then_send(app, session, sending, new=sent is None)
        if sent is not None and not again:
            return app.AsyncResult(sent)
        savepoint = session.begin_nested() if sending.rolled_back and sending.number % 2 else None
        if sent is None:
            order = Order(key=sending.key)
            session.add(order)
        with outbox(session):
            result = signature(app, sending).apply_async()
        if sent is None:
            if result.duplicate:
                raise _InDoubtError(sending.key)
            order.sent = result.id
        if savepoint is not None:
            session.flush()
            savepoint.rollback()
        elif sending.rolled_back:
            session.flush()
            session.rollback()
        session.commit()
        return result


def _order_in_django(app: Celery, sending: Sending, *, again: bool) -> Any:
    """Do the same by Django's ORM, inside of ``transaction.atomic()``."""
    from django.db import close_old_connections, transaction

    from tests.chaos.orm.models import Order as Ordered

    close_old_connections()  # as between two requests
    with transaction.atomic():
        sent = Ordered.objects.filter(key=sending.key).values_list("sent", flat=True).first()
        if sent is not None and not again:
            return app.AsyncResult(sent)
        with transaction.atomic():  # a savepoint
            order = None if sent is not None else Ordered(key=sending.key)
            if order is not None:
                order.save()
            result = signature(app, sending).apply_async()
            if order is not None:
                if result.duplicate:
                    raise _InDoubtError(sending.key)
                order.sent = result.id
                order.save()
            if sending.rolled_back and sending.number % 2:
                transaction.set_rollback(True)
        if sending.rolled_back and not sending.number % 2:
            transaction.set_rollback(True)
    return result


def _order_and_then_send(app: Celery, session: Session, sending: Sending, *, new: bool) -> Any:
    """Do without an outbox: nothing says whether a stored order was sent."""
    if new:
        session.add(Order(key=sending.key, sent=""))
    if sending.rolled_back:
        session.flush()
        session.rollback()
        return None
    session.commit()
    return signature(app, sending).apply_async()


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
