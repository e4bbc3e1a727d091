"""The errors of the library, in one tree.

::

    IdempotentError
    ├── ConfigurationError(ValueError)
    ├── DuplicateMessageError(message_id, task_id, status)    on_duplicate="raise"
    ├── MessageMismatchError(message_id, task_name, differs)  same id, other arguments
    ├── AlreadyProcessingError(message_id, retry_after)       on_processing="raise"
    ├── AlreadyFailedError(message_id, error)                 the first run failed
    ├── LeaseLostError(message_id, token)
    ├── RefusedError(message_id, task_name, reason)           not requeued or forgotten
    └── StoreError
        ├── StoreUnavailableError                             transient
        └── SchemaError                                       run `idempotent init`

A warning, :class:`EagerStoreWarning`, stands beside them.

Celery stores an exception in the result backend as its type and its ``args``, and rebuilds it with ``type(e)(*e.args)``.
``pickle`` does the same. So each class here keeps all constructor arguments in ``args``, in order, and composes its message in
``__str__``.
"""

from __future__ import annotations

__all__ = [
    "AlreadyFailedError",
    "AlreadyProcessingError",
    "ConfigurationError",
    "DuplicateMessageError",
    "EagerStoreWarning",
    "IdempotentError",
    "LeaseLostError",
    "MessageMismatchError",
    "RefusedError",
    "SchemaError",
    "StoreError",
    "StoreUnavailableError",
]


class IdempotentError(Exception):
    """Base of all errors that celery-idempotent raises."""


class ConfigurationError(IdempotentError, ValueError):
    """An option, a setting or a message id is not valid. The text names it and says what to do."""


class DuplicateMessageError(IdempotentError):
    """This message was sent before, and the task has ``on_duplicate="raise"``. Nothing was published.

    Args:
        message_id: The id that is taken.
        task_id: The Celery task id first sent under it; ``AsyncResult(task_id)`` is its result.
        status: The row's status: ``pending``, ``processing`` or ``done``.
    """

    def __init__(self, message_id: str, task_id: str | None = None, status: str | None = None) -> None:
        super().__init__(message_id, task_id, status)
        self.message_id = message_id
        self.task_id = task_id
        self.status = status

    def __str__(self) -> str:
        return (
            f"message {self.message_id!r} was already sent as task {self.task_id} and is {self.status}; "
            f"use another message_id, or on_duplicate='skip' to get the first result"
        )


class MessageMismatchError(IdempotentError):
    """The message id was used before with other arguments. Nothing was published or run.

    Args:
        message_id: The id that is taken.
        task_name: The task it belongs to.
        differs: The names of the arguments that are different, and their types where those are; ``None`` if the row does not have the
            first message any more. No values: they may be secret.
    """

    def __init__(self, message_id: str, task_name: str | None = None, differs: str | None = None) -> None:
        super().__init__(message_id, task_name, differs)
        self.message_id = message_id
        self.task_name = task_name
        self.differs = differs

    def __str__(self) -> str:
        which = "" if self.differs is None else f" (different: {self.differs})"
        return (
            f"message {self.message_id!r} of task {self.task_name} is already known with other arguments{which}; "
            f"make the id depend on all arguments that matter, or set fingerprint=False to ignore the difference"
        )


class AlreadyProcessingError(IdempotentError):
    """Another delivery of this message is running, and the task has ``on_processing="raise"``.

    Args:
        message_id: The message being processed.
        retry_after: Seconds until its lease runs out, unless its owner renews it.
    """

    def __init__(self, message_id: str, retry_after: float | None = None) -> None:
        super().__init__(message_id, retry_after)
        self.message_id = message_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        when = "" if self.retry_after is None else f"; its lease ends in {self.retry_after:.1f} s"
        return f"message {self.message_id!r} is being processed by another delivery{when}"


class AlreadyFailedError(IdempotentError):
    """The first run of this message failed; its body was not run again for this copy.

    Args:
        message_id: The message that failed.
        error: Type and text of the first run's error, as kept in the queue log.
    """

    def __init__(self, message_id: str, error: str | None = None) -> None:
        super().__init__(message_id, error)
        self.message_id = message_id
        self.error = error

    def __str__(self) -> str:
        return (
            f"message {self.message_id!r} already failed: {self.error}; "
            f"set resubmit_failed=True to let a caller send it again under its id"
        )


class LeaseLostError(IdempotentError):
    """This run's claim was taken over or ended while its body ran. Its outcome was not recorded.

    Args:
        message_id: The message whose claim was lost.
        token: The fencing token that this run held.
    """

    def __init__(self, message_id: str, token: int | None = None) -> None:
        super().__init__(message_id, token)
        self.message_id = message_id
        self.token = token

    def __str__(self) -> str:
        return (
            f"the claim on message {self.message_id!r} (token {self.token}) was lost: "
            f"its lease ran out before the body ended, and another delivery owns the message"
        )


class RefusedError(IdempotentError):
    """A message was not requeued, or not forgotten, and stays as it is.

    Args:
        message_id: The message.
        task_name: Its task.
        reason: Why, and what to do instead; for people.
    """

    def __init__(self, message_id: str, task_name: str | None = None, reason: str | None = None) -> None:
        super().__init__(message_id, task_name, reason)
        self.message_id = message_id
        self.task_name = task_name
        self.reason = reason

    def __str__(self) -> str:
        return f"message {self.message_id!r} of task {self.task_name} stays as it is: {self.reason}"


class StoreError(IdempotentError):
    """The queue log could not be read or written."""


class StoreUnavailableError(StoreError):
    """The store did not answer: it is down, unreachable or overloaded. A later attempt may succeed."""

    #: Whether the request is known not to have reached the store. Otherwise it may have taken effect, or may yet. The attribute is for
    #: the direct caller; result backends do not keep it.
    unsent: bool = False


class AccessDeniedError(StoreUnavailableError):
    """The store's server answered, and lets nobody in: the database does not exist, or the account is refused.

    A worker does not start like this. One that runs waits, since a restore may bring the database back. Callers know it as a
    :class:`StoreUnavailableError`; it is no public name.
    """


class SchemaError(StoreError):
    """The queue log's table is missing or has another version. Run ``celery -A proj idempotent init``."""


class EagerStoreWarning(UserWarning):
    """An eager call was recorded in a queue log that outlives this process. Later, the same message is a duplicate, also of real workers."""
