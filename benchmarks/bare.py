"""Publishing behind the bare driver: how far anybody gets who writes a message down before it is published.

Each call sends the statement by which this library's store records a message, the very same, by the driver alone on a connection that it
keeps; and then publishes a plain task. Nothing else of this library takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing

from celery import Task

from benchmarks.drivers import Statement, driver_of
from celery_idempotent import IdempotentTask
from celery_idempotent.producer import Sending
from celery_idempotent.records import Recorded
from celery_idempotent.stores import open_store

__all__ = ["BehindTheDriver"]


class BehindTheDriver:
    """A way to publish.

    Args:
        url: Of the store.
        guarded: A task, whose calls are recorded beforehand.
        plain: The task that is published.
    """

    def __init__(self, url: str, guarded: IdempotentTask, plain: Task) -> None:
        self._url = url
        self._guarded = guarded
        self._plain = plain
        self._driver = driver_of(url)
        self._statements: list[Statement] = []
        self._send: Callable[[Statement], object] | None = None
        self._kept = ExitStack()

    def prepare(self, numbers: Sequence[int]) -> None:
        """Find out what the store sends for these messages, and leave none of them."""
        messages = [Sending.of(self._guarded, (number,), {}, None, {}).message for number in numbers]
        with self._driver.recording() as statements, closing(open_store(self._url)) as store:
            store.init()
            # Once, which loads what there is to load.
            store.record(messages[0])
            store.withdraw(messages[0].key, task_id=messages[0].task_id)
            statements.clear()
            for message in messages:
                assert isinstance(store.record(message), Recorded)
            self._statements = list(statements)
            assert len(self._statements) == len(messages), f"{len(self._statements)} statements of {len(messages)}"
            for message in messages:
                assert store.withdraw(message.key, task_id=message.task_id)
            if self._send is None:
                self._send = self._kept.enter_context(self._driver.connect(store, self._url))

    def __call__(self, name: str, numbers: Iterable[int]) -> None:
        assert self._send is not None
        for number, statement in zip(numbers, self._statements, strict=True):
            self._send(statement)
            self._plain.delay(number)
