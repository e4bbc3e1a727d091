"""Keep a Celery task from taking effect twice.

A queue delivers at least once. ``base=IdempotentTask`` records each message in a table, ``queue_log``, which producer and consumer both
consult. So a repeated call, a redelivered message or a copy is skipped, and no message is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery_idempotent.core.abandoned import Done
from celery_idempotent.errors import (
    AlreadyFailedError,
    AlreadyProcessingError,
    ConfigurationError,
    DuplicateMessageError,
    EagerStoreWarning,
    IdempotentError,
    LeaseLostError,
    MessageMismatchError,
    RefusedError,
    SchemaError,
    StoreError,
    StoreUnavailableError,
)
from celery_idempotent.hooks import Outcome, OutcomeKind
from celery_idempotent.maintenance.operations import LogOperations
from celery_idempotent.message.ids import by_arguments
from celery_idempotent.producer.outbox import outbox
from celery_idempotent.queue_log import QueueLog, of_each_app
from celery_idempotent.task import IdempotentTask
from celery_idempotent.worker.context import CurrentMessage, current_message

if TYPE_CHECKING:
    from celery_idempotent.stores.redis import RedisStore
    from celery_idempotent.stores.sql import SQLStore, queue_log_table

__all__ = [
    "AlreadyFailedError",
    "AlreadyProcessingError",
    "ConfigurationError",
    "CurrentMessage",
    "Done",
    "DuplicateMessageError",
    "EagerStoreWarning",
    "IdempotentError",
    "IdempotentTask",
    "LeaseLostError",
    "MessageMismatchError",
    "Outcome",
    "OutcomeKind",
    "QueueLog",
    "RedisStore",
    "RefusedError",
    "SQLStore",
    "SchemaError",
    "StoreError",
    "StoreUnavailableError",
    "by_arguments",
    "current_message",
    "outbox",
    "queue_log_table",
]

__version__ = "0.1.0"

QueueLog.operations = LogOperations()
of_each_app()


if not TYPE_CHECKING:  # otherwise a type checker would accept any name

    def __getattr__(name: str) -> Any:
        # On first use: SQLAlchemy, its dialects and a Redis client are slow to import, and most modules only declare their tasks.
        if name in {"SQLStore", "queue_log_table"}:
            from celery_idempotent.stores import sql

            return getattr(sql, name)
        if name == "RedisStore":
            from celery_idempotent.stores.redis import RedisStore

            return RedisStore
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
