"""The SQL store: the queue log in PostgreSQL, MySQL, MariaDB or SQLite, by SQLAlchemy Core."""

from __future__ import annotations

from celery_idempotent.stores.sql.store import SQLStore
from celery_idempotent.stores.sql.table import queue_log_table

__all__ = ["SQLStore", "queue_log_table"]
