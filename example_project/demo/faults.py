"""A broker that delivers some messages twice, as every broker may.

Import this beside the app (``celery worker --include example_project.demo.faults``) and the messages that the scenario names
are put on the broker a second time: same task id, same message id, same everything. The app does not know.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from celery.signals import after_task_publish, before_task_publish

from example_project.celery_app import app, settings
from example_project.demo.accounts import copies
from example_project.demo.scenario import Request
from example_project.ledger import Ledger

book = Ledger(settings.store)

# Celery shows the properties before it publishes and not after; the copy is made after, when nobody changes them any more.
_properties: ContextVar[dict[str, Any]] = ContextVar("properties")


@before_task_publish.connect
def keep_properties(properties: dict[str, Any], **_: Any) -> None:
    _properties.set(properties)


@after_task_publish.connect
def publish_once_more(
    sender: str, body: Any, headers: dict[str, Any], exchange: str, routing_key: str, **_: Any
) -> None:
    request_id = next(iter(body[0]), None)
    if not isinstance(request_id, str) or not request_id.startswith(settings.run):
        return
    if sender not in Request.of_id(request_id).trouble.copied:
        return
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
