"""Kill the process that runs a message, then deliver the message again: at one point, or at each in turn."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from billiard.util import _run_after_forkers
from celery import states
from sqlalchemy import Engine

from celery_idempotent.core.records import Duplicate, MessageKey, Owner, Row, Status
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.in_tests.deliveries import Delivery, deliver
from celery_idempotent.in_tests.kill_points import AT_THE_END, KillPoints
from celery_idempotent.producer.prepared import PreparedCall
from celery_idempotent.producer.recorded import republish

if TYPE_CHECKING:
    from celery.result import EagerResult

    from celery_idempotent.in_tests.fresh import FreshLogs
    from celery_idempotent.queue_log import QueueLog
    from celery_idempotent.task import IdempotentTask

__all__ = ["Crash", "Crashes"]

#: Seconds for a child to reach its kill point.
_PATIENCE = 60.0

#: How often what is left in the queue log is recovered: calls of calls.
_PASSES = 5


@dataclass(frozen=True, slots=True)
class Crash:
    """A message whose process was killed.

    Attributes:
        before: The kill point: what the process was about to do.
        result: Of the delivery after the crash; ``None`` if there was none yet.
        row: The message's row at the end.
        delivery: The message.
        points: All points that the process had reached.
    """

    before: str
    result: EagerResult[Any] | None
    row: Row | None
    delivery: Delivery = field(repr=False)
    points: Sequence[str] = field(repr=False, default=())

    def __str__(self) -> str:
        text = f"killed before {self.before}"
        if self.result is not None and self.result.state != states.SUCCESS:
            text += f"; delivered again, it ended as {self.result.state}: {self.result.result!r}"
        return text


class Crashes:
    """Kills processes that run messages.

    Args:
        logs: The test's queue logs.
    """

    def __init__(self, logs: FreshLogs) -> None:
        self._logs = logs

    def crash(self, task: IdempotentTask, args: Any, kwargs: Any, *, at: str) -> Crash:
        """Kill one process; see :meth:`LogInTest.crash`."""
        _refuse_transactions()
        self._logs.in_a_file(task.queue_log, keep=True)
        delivery = self._record(task, args, kwargs)
        report = self._run(delivery, None if at == AT_THE_END else at)
        if "at" not in report:
            points = "\n".join(report["points"])
            raise LookupError(f"the process did not reach {at!r}, but only:\n{points}")
        return Crash(report["at"], None, self._row(delivery), delivery, report["points"])

    def each(self, task: IdempotentTask, args: Any, kwargs: Any, *, reset: Callable[[], object]) -> Iterator[Crash]:
        """Kill a process at each point in turn; see :meth:`LogInTest.each_crash`."""
        _refuse_transactions()
        self._logs.in_a_file(task.queue_log, keep=False)
        return self._each(task, args, kwargs, reset)

    def deliver_again(self, crash: Crash) -> EagerResult[Any]:
        """Deliver a message whose process was killed, after its lease has run out."""
        return self._logs.deliveries.again(crash.delivery)

    def _each(self, task: IdempotentTask, args: Any, kwargs: Any, reset: Callable[[], object]) -> Iterator[Crash]:
        number = last = 0
        while number <= last:
            reset()
            self._logs.erase()
            delivery = self._record(task, args, kwargs)
            report = self._run(delivery, number or None)
            if number == 0:
                last = len(report["points"])
            elif "at" not in report:
                return  # this time it has come to its end with fewer points
            result = self._recover(delivery)
            yield Crash(report.get("at", AT_THE_END), result, self._row(delivery), delivery, report["points"])
            number += 1

    def _record(self, task: IdempotentTask, args: Any, kwargs: Any) -> Delivery:
        """Record a message as its producer does."""
        prepared = PreparedCall.of(task, args, kwargs, None, {})
        if isinstance(task.queue_log.store.record(prepared.message), Duplicate):
            raise ConfigurationError(
                f"{prepared.message.key} is in the queue log already, and was not sent by this test: give the test other arguments, "
                f"or a database of its own"
            )
        request = {"retries": 0, "ignore_result": task.ignore_result, "root_id": prepared.message.task_id}
        return Delivery(task, tuple(prepared.args or ()), dict(prepared.kwargs or {}), prepared.header, request)

    def _row(self, delivery: Delivery) -> Row | None:
        return delivery.task.queue_log.store.find(delivery.header.key)

    def _recover(self, delivery: Delivery) -> EagerResult[Any]:
        """Deliver a message again, and publish what else its process has left in the queue log."""
        queue_log = delivery.task.queue_log
        row = self._row(delivery)
        _end_lease(queue_log, row)
        request = {**delivery.request, "retries": 0 if row is None or row.status is not Status.PENDING else row.attempt}
        again = Delivery(delivery.task, delivery.args, delivery.kwargs, delivery.header, request)
        result = self._logs.deliveries.again(again)
        for _ in range(_PASSES):
            rows = [row for key in self._logs.written(queue_log) if (row := queue_log.store.find(key)) is not None]
            left = [row for row in rows if row.status is not Status.DONE and row.message is not None]
            for row in left:
                _end_lease(queue_log, row)
                republish(queue_log, row)
            if not left or not queue_log.app.conf.task_always_eager:
                break  # a worker, if any, gets what was published
        return result

    # -- the child -----------------------------------------------------------------------------------------------------

    def _run(self, delivery: Delivery, at: int | str | None) -> Mapping[str, Any]:
        """Run a message in a child that is killed; return what the child has reported."""
        engines = _engines()
        _close_djangos_connections()
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads is forked: see the page
            pid = os.fork()
        if pid == 0:
            try:
                os.close(reading)
                self._be_the_child(delivery, at, writing, engines)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.close(writing)
        report = _await(pid, reading)
        keys = [MessageKey(*key) for key in report["inserted"]]
        self._logs.note(delivery.task.queue_log, keys)
        if "refused" in report:
            raise ConfigurationError(report["refused"])
        if "failed" in report:
            raise AssertionError(f"the task fails without having been killed:\n{report['failed']}")
        return report

    def _be_the_child(
        self, delivery: Delivery, at: int | str | None, pipe: int, engines: Sequence[weakref.ref[Engine]]
    ) -> NoReturn:
        queue_log = delivery.task.queue_log
        points = KillPoints(at, pipe, lambda: self._logs.inserted(queue_log))
        try:
            _leave_the_parents_connections(engines)
            points.install(delivery.task)
            result = deliver(delivery, redelivered=False)
            sys.settrace(None)
        except BaseException:  # noqa: BLE001 - the parent raises it
            points.die(failed=traceback.format_exc())
        if at is None and result.state != states.SUCCESS:
            points.die(failed=result.traceback or repr(result.result))
        points.die(**({"at": AT_THE_END} if at is None else {}))
        raise AssertionError("unreachable")


def _await(pid: int, pipe: int) -> Mapping[str, Any]:
    """Wait for a child's end; return its report."""
    deadline, data = time.monotonic() + _PATIENCE, b""
    try:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(
                    f"a child did not end within {_PATIENCE:g} s. It was forked from a process with threads, and may wait for "
                    f"a lock that one of them held, or for a lock in the database: end the test's own transactions before"
                )
            read = os.read(pipe, 65536)
            if not read:
                break
            data += read
            if data.endswith(b"\n"):
                break
    finally:
        os.close(pipe)
        _, status = os.waitpid(pid, 0)
    if not data:
        raise AssertionError(f"the child ended before its kill point, with the status {status}")
    report: Mapping[str, Any] = json.loads(data)
    return report


def _end_lease(queue_log: QueueLog, row: Row | None) -> None:
    if row is not None and row.status is Status.PROCESSING and row.worker is not None:
        queue_log.store.expire(Owner(row.key, row.worker))


# -- connections, which a child must not share with its parent ----------------------------------------------------------------


def _engines() -> list[weakref.ref[Engine]]:
    """Return all of SQLAlchemy's engines in this process. There is no list of them."""
    return [weakref.ref(found) for found in gc.get_objects() if issubclass(type(found), Engine)]


def _leave_the_parents_connections(engines: Sequence[weakref.ref[Engine]]) -> None:
    for reference in engines:
        engine = reference()
        if engine is not None:
            engine.dispose(close=False)
    _run_after_forkers()  # as Celery's own children do: brokers and result backends


def _refuse_transactions() -> None:
    """Refuse to kill where a child could not take part.

    Raises:
        ConfigurationError: One of Django's connections is in a transaction, or in memory.
    """
    for wrapper in _djangos_connections():
        if wrapper.in_atomic_block:
            raise ConfigurationError(
                f"a killed process takes no part in the transaction that this test has open on the alias {wrapper.alias!r}: "
                f"use a TransactionTestCase, or django_db(transaction=True), instead of a TestCase"
            )
        if wrapper.vendor == "sqlite" and wrapper.is_in_memory_db():
            raise ConfigurationError(
                f"a killed process has only a copy of the test database of alias {wrapper.alias!r}, which is in memory: "
                f"give it a file, DATABASES[{wrapper.alias!r}]['TEST'] = {{'NAME': 'test.db'}}"
            )


def _close_djangos_connections() -> None:
    for wrapper in _djangos_connections():
        wrapper.close()


def _djangos_connections() -> list[Any]:
    """Return this thread's connections, if Django is in use."""
    database = sys.modules.get("django.db")
    if database is None or not sys.modules["django.conf"].settings.configured:
        return []
    return list(database.connections.all(initialized_only=True))
