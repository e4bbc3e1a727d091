"""The Celery app of a Django project, and its queue log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery import current_app
from django.conf import settings

from celery_idempotent.contrib.django.connections import alias_of
from celery_idempotent.queue_log import QueueLog

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["alias_of_log", "celery_app", "queue_log", "table_name"]


def celery_app() -> Celery:
    """Return the project's Celery app: the one that ``shared_task`` uses and the project's package imports."""
    return current_app._get_current_object()  # noqa: SLF001 - documented by Celery for its proxies


def queue_log() -> QueueLog:
    """Return its queue log."""
    return QueueLog.of(celery_app())


def table_name() -> str:
    """Return the table's name from Django's settings, because models and migrations load before the Celery app."""
    for name in ("CELERY_IDEMPOTENT_TABLE", "IDEMPOTENT_TABLE", "idempotent_table"):
        if hasattr(settings, name):
            return str(getattr(settings, name))
    return "queue_log"


def alias_of_log() -> str | None:
    """Return the alias of the database that holds the queue log; ``None`` if it is elsewhere."""
    return alias_of(str(queue_log().settings.store))
