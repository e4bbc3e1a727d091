"""The port as a whole: the verbs of all roles, and their limits."""

from __future__ import annotations

from typing import Protocol

from celery_idempotent.core.store.admin import Operator
from celery_idempotent.core.store.claims import Claimer
from celery_idempotent.core.store.recording import Recorder
from celery_idempotent.core.store.recovering import Recoverer
from celery_idempotent.core.store.schema import Schema
from celery_idempotent.core.store.transitions import Ender

__all__ = ["BATCH", "LARGE_MESSAGE", "Store"]

#: Bytes of the largest message that recovery's verbs read with its row: some hundreds of them are in memory at once.
LARGE_MESSAGE = 64 * 1024

#: How many rows one statement of recovery, the relay or the purge reads or deletes.
BATCH = 200


class Store(Recorder, Claimer, Ender, Recoverer, Operator, Schema, Protocol):
    """A store of the queue log: the verbs of all roles."""
