"""Find the messages of a queue log, look at them, and change them: what Python, the command line, Flower and Django's admin share."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, overload

from celery_idempotent.core.records import FORGOTTEN, MessageKey, ProcessedStatus, Row, RowFilter, Status
from celery_idempotent.core.requeued import Requeued
from celery_idempotent.core.storable import is_text
from celery_idempotent.errors import ConfigurationError, RefusedError
from celery_idempotent.settings import one_of, seconds

if TYPE_CHECKING:
    from celery import Task

    from celery_idempotent.core.store import Store

__all__ = ["CHANGED", "Messages", "Operations"]

#: Why nothing was changed: another process was first.
CHANGED = "it has changed in the meantime; look at it again"


class Operations(Protocol):
    """What higher layers do for :class:`Messages`: the producer knows ids, and the relay publishes."""

    def key_of(self, queue_log: Any, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MessageKey:
        """Return the key of the message that a call with these arguments is."""

    def requeue(self, queue_log: Any, row: Row, *, publish: bool) -> Requeued:
        """Make a message wait again; see :meth:`Messages.requeue`."""

    def forget(self, queue_log: Any, row: Row, *, force: bool) -> bool:
        """Empty a row; return whether there was one. See :meth:`Messages.forget`."""


class Messages:
    """The messages of a queue log."""

    #: Set by the package, since these are in layers above this one.
    operations: ClassVar[Operations]

    @property
    def store(self) -> Store:
        """The store."""
        raise NotImplementedError

    def find(self, task: Task[Any, Any] | str, /, *args: Any, **kwargs: Any) -> Row | None:
        """Return the message that a call of a task is, or would be.

        The id is computed as for ``task.delay(*args, **kwargs)``, from the task's option ``message_id``. Nothing is sent.

        Args:
            task: The task, or the name of one of this app.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            The row as it is now, with its message and its result, both encoded; ``None`` if no such message was recorded, or its
            row has been purged.

        Raises:
            ConfigurationError: This app has no guarded task of this name; or the task has no ``message_id``, so that its messages are
                known by the ids of their results: use :meth:`find_id`. Or an argument has no canonical form.
            TypeError: The arguments do not fit the body.
            StoreError: The store did not answer, or its schema has another version.

        Atomicity: one statement; it reads.
        """
        key = self.operations.key_of(self, task, args, kwargs)
        return self.find_id(key.task_name, key.message_id)

    def find_id(self, task: Task[Any, Any] | str, message_id: str) -> Row | None:
        """Return the latest message of an id.

        Args:
            task: The task, or its name. The app need not have it.
            message_id: The id, exactly: ``*`` and ``?`` are no wildcards here. It is ``result.message_id`` of a call.

        Returns:
            The row, as :meth:`find` does.

        Raises:
            TypeError: ``task`` is neither a task nor a name, or ``message_id`` is not a string.
            StoreError: The store did not answer, or its schema has another version.

        Atomicity: one statement; it reads.
        """
        name = _name_of(task)
        if not isinstance(message_id, str):
            raise TypeError(f"message_id must be a string, not {type(message_id).__name__}: all ids are text")
        if not (is_text(message_id) and is_text(name)):  # no store can have kept it
            return None
        return self.store.find(MessageKey(message_id, name))

    def rows(
        self,
        *,
        message_id: str | None = None,
        task: Task[Any, Any] | str | None = None,
        status: Status | Literal["pending", "processing", "done"] | None = None,
        processed_status: ProcessedStatus | Literal["success", "failure"] | None = None,
        queue: str | None = None,
        error: str | None = None,
        older_than: float | timedelta | None = None,
        newer_than: float | timedelta | None = None,
        limit: int = 100,
        oldest_first: bool = False,
    ) -> list[Row]:
        """Return the messages that meet all conditions, the last recorded first.

        Args:
            message_id: The id, or a pattern with ``*`` and ``?``.
            task: The task, its name, or a pattern with ``*`` and ``?``.
            status: Only messages in this status.
            processed_status: Only messages that ended this way. Rows that were forgotten are left out then.
            queue: The queue that they were routed to, or a pattern with ``*`` and ``?``.
            error: The type and text of the error that they ended with, or a pattern: ``"ConnectionError*"``.
            older_than: Only messages that have been done for at least this long, or were recorded so long ago if they are not done; in
                seconds, or as a timedelta.
            newer_than: Only messages younger than that.
            limit: The most messages to return; > 0.
            oldest_first: Whether to return the first recorded instead.

        Returns:
            The rows. Their ``message`` and ``result`` are left out, because they can be large: :meth:`find_id` has them.

        Hazard:
            A condition other than an exact id with its task, or a status, reads the whole log; in Redis, all conditions do.

        Raises:
            ConfigurationError: A condition has a wrong value.
            StoreError: The store did not answer, or its schema has another version.
        """
        texts = {
            "message_id": message_id,
            "task_name": None if task is None else _name_of(task),
            "queue": queue,
            "error": error,
        }
        number: object = limit
        if type(number) is not int or number < 1:
            raise ConfigurationError(f"limit must be a whole number of messages, 1 or more, not {limit!r}")
        where = RowFilter(
            **texts,
            status=None if status is None else Status(one_of("status", status, *map(str, Status))),
            processed_status=None
            if processed_status is None
            else ProcessedStatus(one_of("processed_status", processed_status, *map(str, ProcessedStatus))),
            older_than=None if older_than is None else seconds("older_than", older_than, positive=False),
            newer_than=None if newer_than is None else seconds("newer_than", newer_than, positive=False),
            limit=limit,
            oldest_first=oldest_first,
        )
        if not all(text is None or is_text(text) for text in texts.values()):  # no store can have kept it
            return []
        return list(self.store.rows(where))

    @overload
    def requeue(self, row: Row, /, *, publish: bool = True) -> Requeued: ...
    @overload
    def requeue(self, task: Task[Any, Any] | str, message_id: str, /, *, publish: bool = True) -> Requeued: ...
    def requeue(
        self, message: Row | Task[Any, Any] | str, message_id: str | None = None, /, *, publish: bool = True
    ) -> Requeued:
        """Give a message that failed, or whose worker died, another chance, and publish it.

        It starts over with all its retries, without its ETA and its expiry, under its message id and its Celery id. So the first
        call's AsyncResult will show the new outcome, and a chain goes on. Calls that its body made are not made twice.

        Args:
            message: The row, as it was read; or the task, or its name.
            message_id: The id of the message, with a task.
            publish: Whether to publish it here. With ``False`` a worker does, within ``idempotent_recovery_interval``, or the next call
                that publishes; so many messages go to the broker together.

        Returns:
            The message's key, the Celery id that it is published under, whether that is a new one, and whether the broker has it. If
            the broker is down, it does not; the message waits in the log, and a worker publishes it.

        Raises:
            RefusedError: There is no such message. It waits already, runs, has succeeded, or was forgotten. Its app, its task or its message is not
                to be had. Or it has changed since the row was read. The text says what to do; nothing was changed.
            StoreError: The store did not answer, or its schema has another version.

        Atomicity: one statement (compare and set on status, token and Celery id): of N concurrent callers one requeues.
        """
        key = _key_of(message, message_id)
        row = self.find_id(key.task_name, key.message_id)  # also if there is a row: those of `rows` lack their message
        if row is None:
            reason = "there is no such message, or its row was purged; send it again by a call"
            raise RefusedError(key.message_id, key.task_name, reason)
        if isinstance(message, Row) and _state(row) != _state(message):
            raise RefusedError(key.message_id, key.task_name, CHANGED)
        return self.operations.requeue(self, row, publish=publish)

    @overload
    def forget(self, row: Row, /, *, force: bool = False) -> bool: ...
    @overload
    def forget(self, task: Task[Any, Any] | str, message_id: str, /, *, force: bool = False) -> bool: ...
    def forget(
        self, message: Row | Task[Any, Any] | str, message_id: str | None = None, /, *, force: bool = False
    ) -> bool:
        """Empty a message's row, so that its id is free: the next call under it is a new message, whatever its arguments.

        Its arguments, result and error are gone. What is left of the row is its fencing token, until it is purged.

        Args:
            message: The row, as it was read; or the task, or its name.
            message_id: The id of the message, with a task.
            force: Whether to forget a message that waits or runs, too.

        Returns:
            ``True``; ``False`` if there was nothing to forget: no such message, or one that was forgotten before.

        Hazard:
            A copy that the broker still has runs as a new message. One that waits will still run, unless the broker has lost it. One that
            runs is not stopped, and its outcome is refused.

        Raises:
            RefusedError: It waits or runs, and ``force`` is false. Or it has changed since the row was read. Nothing was changed.
            StoreError: The store did not answer, or its schema has another version.

        Atomicity: one statement (compare and set on status, token and Celery id).
        """
        key = _key_of(message, message_id)
        row = message if isinstance(message, Row) else self.find_id(key.task_name, key.message_id)
        if row is None or row.error == FORGOTTEN:
            return False
        return self.operations.forget(self, row, force=force)


def _state(row: Row) -> tuple[object, ...]:
    return (row.key, row.status, row.processed_status, row.token, row.task_id)


def _key_of(message: Any, message_id: str | None) -> MessageKey:
    if isinstance(message, Row):
        if message_id is not None:
            raise TypeError("give a row, or a task and a message id, not both")
        return message.key
    if not isinstance(message_id, str):
        raise TypeError(
            f"a task and a message id are needed, or a row; the id is {message_id!r}. "
            f"For the id of a call, see result.message_id, or queue_log.find(task, *args)"
        )
    return MessageKey(message_id, _name_of(message))


def _name_of(task: Any) -> str:
    """Return the name of a task."""
    name = task if isinstance(task, str) else getattr(task, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"{task!r} is neither a task nor the name of one")
    return name
