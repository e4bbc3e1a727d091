"""A broker that delivers some messages twice, as every broker may; and a machine that fails around a commit.

Import this beside the app (``celery worker --include example_project.demo.faults``). The messages that the scenario names are put on
the broker a second time: same task id, same message id, same everything. And the process that tells a customer is killed, the first
time, either when the text is sent, the row is written and the commit is still to come, or right behind that. The app does not know.
"""

from __future__ import annotations

import os
import signal
from contextvars import ContextVar
from typing import Any

from celery.signals import after_task_publish, before_task_publish
from sqlalchemy import Connection, Engine, Executable, Insert, Pool, event
from sqlalchemy.pool import ConnectionPoolEntry

from example_project import ledger
from example_project.celery_app import app, settings
from example_project.demo.accounts import copies
from example_project.demo.scenario import Request
from example_project.ledger import Ledger

book = Ledger(settings.store)

# Celery shows the properties before it publishes and not after; the copy is made after, when nobody changes them any more.
_properties: ContextVar[dict[str, Any]] = ContextVar("properties")

#: Where a connection keeps for whose sake its process is killed once it has committed.
DOOMED = "doomed"


def request_of(body: Any) -> Request | None:
    """Which request a message is about; ``None`` for Celery's own."""
    request_id = next(iter(body[0]), None)
    if not isinstance(request_id, str) or not request_id.startswith(settings.run):
        return None
    return Request.of_id(request_id)


@before_task_publish.connect
def keep_properties(properties: dict[str, Any], **_: Any) -> None:
    _properties.set(properties)


@after_task_publish.connect
def publish_once_more(
    sender: str, body: Any, headers: dict[str, Any], exchange: str, routing_key: str, **_: Any
) -> None:
    request = request_of(body)
    if request is None or sender not in request.trouble.copied:
        return
    request_id = request.id_in(settings.run)
    if book.count(copies, request_id, "task_id")[headers["id"],]:
        return  # held by the queue log, or recovered: it is the first one, published again
    book.append(copies, request_id=request_id, task_name=sender, task_id=headers["id"])
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            body,
            serializer=app.conf.task_serializer,
            exchange=exchange,
            routing_key=routing_key,
            headers=headers,
            **_properties.get(),
        )


@event.listens_for(Engine, "after_execute")
def die_before_the_commit(connection: Connection, statement: Executable, *_: Any) -> None:
    if not isinstance(statement, Insert) or statement.table is not ledger.messages:
        return
    request_id = str(statement.compile().params["request_id"])
    moment = Request.of_id(request_id).trouble.worker_dies
    if moment == "before":
        die_once(request_id, moment)
    elif moment == "after":
        connection.info[DOOMED] = request_id


@event.listens_for(Pool, "checkin")
def die_after_the_commit(_: Any, record: ConnectionPoolEntry) -> None:
    if request_id := record.info.pop(DOOMED, None):
        die_once(request_id, "after")


def die_once(request_id: str, moment: str) -> None:
    """End this process by SIGKILL, unless that was done; it is noted in a file, which no transaction takes back."""
    try:
        (settings.directory / f"killed-{moment}-{request_id}").touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
