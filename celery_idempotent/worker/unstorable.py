"""Handle values that a store does not take: a result or a message that is too large for its server, or cannot be stored there.

The value is for a later replay or publication, so write the outcome without it. Without an outcome, the row would stay ``processing``, and
the body would run again and again. If neither the result backend nor the row takes a value, the message fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from celery.backends.base import DisabledBackend
from kombu.exceptions import EncodeError

from celery_idempotent.errors import SchemaError, StoreError, StoreUnavailableError
from celery_idempotent.worker.celery_versions import ignores_result

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.producer.guarded import Guarded

__all__ = ["Keeping", "refused_by_backend"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")

#: Bytes from which a value may be the reason that a server does not answer. MariaDB closes the connection on a packet beyond
#: ``max_allowed_packet``, as if it had died.
_LARGE = 1 << 20

#: How often a server may not answer to such a value before the value is taken as refused.
_SILENCES = 2


class Keeping:
    """Whether the store takes a delivery's value.

    Attributes:
        refused: Whether the store has refused it.
    """

    def __init__(self) -> None:
        self.refused = False
        self._silences = 0

    def of(self, value: bytes | None) -> bytes | None:
        """Return the value; ``None`` if the store has refused it."""
        return None if self.refused else value

    def learn(self, error: Exception, value: bytes | None, *, silent: bool) -> bool:
        """Decide from a write's error whether the store refuses the value.

        Args:
            error: The error.
            value: The value that was written.
            silent: Whether the server did not answer, instead of refusing.

        Returns:
            Whether to repeat the write without the value.
        """
        if value is None:
            return False
        if silent:
            self._silences += 1
            if len(value) < _LARGE or self._silences < _SILENCES:
                return False
        logger.error("a value of %d bytes is not kept, because the store did not take it: %s", len(value), error)
        self.refused = True
        return True

    def write(self, value: bytes | None, ask: Callable[[bytes | None], T]) -> T:
        """Write the row with the value, or without it if the store does not take the value.

        Args:
            value: The value.
            ask: Calls the store, with the value or with ``None``.

        Raises:
            StoreError: From the store.
        """
        kept = self.of(value)
        try:
            return ask(kept)
        except SchemaError:
            raise
        except StoreError as error:
            if not self.learn(error, kept, silent=isinstance(error, StoreUnavailableError)):
                raise
        return ask(None)


def refused_by_backend(task: Guarded, request: Context, value: Any) -> EncodeError | None:
    """Return the error that the caller will get because the result backend cannot take the value; ``None`` if it can."""
    backend = task.backend
    stored = not request.is_eager or task.store_eager_result
    if not stored or ignores_result(task, request) or isinstance(backend, DisabledBackend):
        return None
    try:
        backend.encode(backend.prepare_value(value))
    except EncodeError as error:
        return error
    return None
