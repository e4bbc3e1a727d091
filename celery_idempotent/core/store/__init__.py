"""The port through which the queue log is read and written.

A store keeps rows and answers by its own clock; it takes no decision that needs Celery. Every method is atomic and safe
between threads, processes and hosts. Each raises :class:`~celery_idempotent.errors.StoreUnavailableError` when the store gave
no answer (nothing is known to have been written, and the call may be repeated) and
:class:`~celery_idempotent.errors.SchemaError` when the table is missing or of an older version. The suite in
:mod:`celery_idempotent.testing` is the contract in executable form.
"""

from celery_idempotent.core.store.port import BATCH, LARGE_MESSAGE, Store
from celery_idempotent.core.store.schema import Change
from celery_idempotent.core.store.transactional import Surrounding, TransactionalStore, TransactionStatus

__all__ = ["BATCH", "LARGE_MESSAGE", "Change", "Store", "Surrounding", "TransactionStatus", "TransactionalStore"]
