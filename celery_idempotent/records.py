"""The records of the queue log, for those who read its rows: ``RowFilter``, ``Row`` and the like."""

from __future__ import annotations

from celery_idempotent.core.records import Change, MessageKey, ProcessedStatus, Row, RowFilter, Status, TaskCount

__all__ = ["Change", "MessageKey", "ProcessedStatus", "Row", "RowFilter", "Status", "TaskCount"]
