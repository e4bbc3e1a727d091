"""Values that a store does not take: a result or a message that is too large for its server, or not storable there.

The value is for a later replay, or a later publication. An outcome without it is better than none: without an outcome the row would stay
``processing``, and the body would run again and again. A value that the result backend does not take, and no row keeps, is a failure.
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

#: Bytes from which a value may be why a server gives no answer. MariaDB closes the connection on a packet beyond ``max_allowed_packet``,
#: which looks as if it had died.
_LARGE = 1 << 20

#: How often a server may give no answer to such a value before that is taken for its answer.
_SILENCES = 2


class Keeping:
    """What one delivery has learned about its value: whether the store takes it.

    Attributes:
        refused: Whether it does not.
    """

    def __init__(self) -> None:
        self.refused = False
        self._silences = 0

    def of(self, value: bytes | None) -> bytes | None:
        """Return the value, as far as the store takes it."""
        return None if self.refused else value

    def learn(self, error: Exception, value: bytes | None, *, silent: bool) -> bool:
        """Take an error of a write for what it says about the value.

        Args:
            error: The error.
            value: What was written.
            silent: Whether the server gave no answer, rather than refuse.

        Returns:
            Whether the write is to be repeated without the value.
        """
        if value is None:
            return False
        if silent:
            self._silences += 1
            if len(value) < _LARGE or self._silences < _SILENCES:
                return False
        logger.error("a value of %d bytes is not kept, since the store did not take it: %s", len(value), error)
        self.refused = True
        return True

    def write(self, value: bytes | None, ask: Callable[[bytes | None], T]) -> T:
        """Write the value, or what goes with it if the store does not take the value itself.

        Args:
            value: The value.
            ask: One call of the store, with the value or without.

        Raises:
            StoreError: As the store's.
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
    """Return what Celery will tell the caller instead of the value: that its result backend cannot take it."""
    backend = task.backend
    stored = not request.is_eager or task.store_eager_result
    if not stored or ignores_result(task, request) or isinstance(backend, DisabledBackend):
        return None
    try:
        backend.encode(backend.prepare_value(value))
    except EncodeError as error:
        return error
    return None
