"""What a test does with the queue log: look at rows, deliver a message again, kill a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from celery.canvas import Signature
from celery.result import AsyncResult

from celery_idempotent.core.records import Owner, Row, Status
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.in_tests.crashes import Crash, Crashes
from celery_idempotent.queue_log import QueueLog

if TYPE_CHECKING:
    from celery_idempotent.in_tests.fresh import FreshLogs
    from celery_idempotent.task import IdempotentTask

__all__ = ["LogInTest"]


class LogInTest:
    """The queue logs that a test has used: the fixture ``queue_log``.

    Args:
        logs: All queue logs, and the test's messages.
    """

    def __init__(self, logs: FreshLogs) -> None:
        self._logs = logs
        self._crashes = Crashes(logs)

    def message(
        self, task: IdempotentTask | Signature[Any] | AsyncResult[Any], /, *args: Any, **kwargs: Any
    ) -> Row | None:
        """Return the row of a message.

        Args:
            task: The task that was called, or the signature. Or the call's result: for a task without a message id, and for a call with
                an id of its own.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            The row as it is now; ``None`` if there is none.

        Raises:
            ConfigurationError: The task has no message id, so its arguments do not identify a message.
            TypeError: The arguments do not fit the body.
        """
        if isinstance(task, AsyncResult):
            return next((row for row in self.messages() if row.task_id == task.id), None)
        task, args, kwargs = _call(task, args, kwargs)
        if task.idempotency.message_id is None:
            raise ConfigurationError(
                f"task {task.name} has no message_id, so its messages are known by their Celery ids: "
                f"give the result of the call, queue_log.message(result)"
            )
        return task.queue_log.find(task, *args, **kwargs)

    def messages(self) -> list[Row]:
        """Return the rows of the messages that this test has sent, in all its apps, first recorded first.

        In a log in the app's own database these are the rows that the test's process has inserted.
        """
        found = [row for queue_log, row in self._rows()]
        return sorted(found, key=lambda row: row.created_timestamp)

    def deliver_again(self, result: AsyncResult[Any] | Crash, *, timeout: float = 10.0) -> Any:
        """Deliver a message once more, as a broker does: the same ids, arguments and headers, marked as redelivered.

        Args:
            result: The result of a call of this test, or a crash.
            timeout: Seconds to wait for a worker; an eager call needs none.

        Returns:
            The result of this delivery. ``duplicate`` is true if the body did not run.

        Raises:
            LookupError: No such message was sent in this test.
            TimeoutError: No worker took it.
        """
        if isinstance(result, Crash):
            return self._crashes.deliver_again(result)
        app = getattr(result, "app", None)
        return self._logs.deliveries.repeat(app, str(result.id), timeout)

    def expire_leases(self) -> int:
        """End the leases of all messages that are processing, as if their workers had died long ago; return how many."""
        expired = 0
        for queue_log, row in self._rows():
            if row.status is Status.PROCESSING and row.worker is not None:
                expired += queue_log.store.expire(Owner(row.key, row.worker))
        return expired

    def crash(self, task: IdempotentTask | Signature[Any], /, *args: Any, at: str, **kwargs: Any) -> Crash:
        """Send a message, and kill the process that runs it, by ``SIGKILL``. The message is not delivered again.

        Args:
            task: The task, or a signature.
            args: Positional arguments of the call.
            at: Part of a kill point's name, such as ``"complete"`` or ``"tasks.py:12"``. The first point with it is taken.
            kwargs: Keyword arguments of the call.

        Returns:
            What happened; :meth:`deliver_again` takes it.

        Raises:
            ConfigurationError: Another process cannot see what this test does: see :meth:`each_crash`.
            LookupError: There is no such point. The text names those there are.
        """
        return self._crashes.crash(*_call(task, args, kwargs), at=at)

    def each_crash(
        self, task: IdempotentTask | Signature[Any], /, *args: Any, reset: Callable[[], object], **kwargs: Any
    ) -> Iterator[Crash]:
        """Run a message again and again. Each time its process is killed at another point, and then the message is delivered again.

        The process is a forked child, killed by ``SIGKILL``: before each step of the library, before each line of the task's own
        function when it is first reached, and before its return. The message is recorded before, and delivered again after, in the
        test's own process. After that, look at the effects. The first round kills at the end, just before the acknowledgement.

        Args:
            task: The task, or a signature.
            args: Positional arguments of the call.
            reset: Undoes the effects, before each round. The queue log is emptied too.
            kwargs: Keyword arguments of the call.

        Yields:
            What happened. Its text names the kill point.

        Raises:
            ConfigurationError: The log or another database in use is in memory, or the test is inside of a transaction, as in Django's
                ``TestCase``: a killed child would take part in neither.
            AssertionError: The task fails without having been killed.
            TimeoutError: A child did not reach its kill point or its end within 60 seconds.
        """
        return self._crashes.each(*_call(task, args, kwargs), reset=reset)

    def _rows(self) -> Iterator[tuple[QueueLog, Row]]:
        for queue_log in self._logs.used():
            for key in self._logs.written(queue_log):
                row = queue_log.store.find(key)
                if row is not None:
                    yield queue_log, row


def _call(task: Any, args: Any, kwargs: Any) -> tuple[IdempotentTask, Any, Any]:
    """Return the task and the arguments of a call, also of a signature."""
    if isinstance(task, Signature):
        return task.type, (*task.args, *args), {**task.kwargs, **kwargs}
    if not hasattr(task, "idempotency"):
        raise TypeError(f"{task!r} is not a task with base=IdempotentTask")
    return task, args, kwargs
