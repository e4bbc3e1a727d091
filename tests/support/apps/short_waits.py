"""An app for which two seconds are a long outage: ``celery -A tests.support.apps.short_waits worker``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_idempotent.core import store_retry
from celery_idempotent.core.backoff import Backoff
from celery_idempotent.stores.sql import connection
from celery_idempotent.stores.sql.dialects import mysql, postgresql

__all__ = ["shorten_waits"]


def shorten_waits(set_attribute: Callable[[Any, str, Any], object]) -> None:
    """Shorten every time for which the store is waited for, in this process.

    Args:
        set_attribute: ``setattr``, or a ``monkeypatch.setattr`` that takes it back.
    """
    set_attribute(store_retry, "WAIT_IN_PLACE", 0.5)
    set_attribute(store_retry, "_BACKOFF", Backoff(0.1, longest=0.5))
    set_attribute(store_retry, "REDELIVER_AFTER", 1.0)
    set_attribute(connection, "ANSWER", 2.0)
    set_attribute(postgresql, "_CONNECT_TIMEOUT", 2)  # libpq takes less for as much
    set_attribute(mysql, "_CONNECT_TIMEOUT", 2)


def __getattr__(name: str) -> Any:
    # Celery asks for `app`; other importers need only the function.
    if name == "app":
        shorten_waits(setattr)
        from tests.support.apps.worker import app

        return app
    raise AttributeError(name)
