"""The records of the queue log, for code that reads its rows: ``Row``, ``Status``, ``Requeued`` and others."""

from __future__ import annotations

from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row, RowFilter, Status, TaskCount
from celery_idempotent.core.requeued import Requeued
from celery_idempotent.core.store import Change

__all__ = ["Change", "MessageKey", "ProcessedStatus", "Requeued", "Row", "RowFilter", "Status", "TaskCount"]
