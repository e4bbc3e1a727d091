"""The bare driver: how far anybody gets who writes a message down before it is published, and claims and completes it in its worker.

What is sent are the statements of this library's store, the very same, by the driver alone on a connection that it keeps; and what is
published and run is a plain task. Nothing else of this library takes part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from celery import Task

from benchmarks.drivers import Statement, driver_of
from celery_idempotent import IdempotentTask
from celery_idempotent.core.records import Claimed, Inserted, MessageKey, NewMessage
from celery_idempotent.producer.prepared import PreparedCall
from celery_idempotent.stores import open_store
from celery_idempotent.stores.redis.layout import Layout, identity

__all__ = ["BehindTheDriver", "BetweenTheStatements"]


class _Bare:
    """A plain task beside the statements that a store sends for a guarded one.

    Args:
        url: Of the store.
        guarded: The task whose messages are recorded.
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


class BehindTheDriver(_Bare):
    """A way to publish: behind the statement that records the message."""

    def prepare(self, numbers: Sequence[int]) -> None:
        """Find out what the store sends for these messages, and leave none of them."""
        messages = [PreparedCall.of(self._guarded, (number,), {}, None, {}).message for number in numbers]
        with self._driver.recording() as statements, closing(open_store(self._url)) as store:
            store.init()
            # Once, which loads what there is to load.
            store.record(messages[0])
            store.withdraw(messages[0].key, task_id=messages[0].task_id)
            statements.clear()
            for message in messages:
                assert isinstance(store.record(message), Inserted)
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


class BetweenTheStatements(_Bare):
    """A task's body between the statements by which the store claims its message and completes it; the task calls :meth:`run`.

    They are learnt once in each process, of a message of its own, and sent again with others' names in the place of that one's.
    """

    def __init__(self, url: str, guarded: IdempotentTask, plain: Task) -> None:
        super().__init__(url, guarded, plain)
        self._layout = Layout("queue_log")
        #: What the statements were learnt of.
        self._learnt = MessageKey("", guarded.name)

    # -- in the producer -------------------------------------------------------------------------------------------------------

    def prepare(self, numbers: Sequence[int]) -> None:
        """Record these messages."""
        with closing(open_store(self._url)) as store:
            store.init()
            recorded = store.record_all(list(self._messages(f"{number:07}" for number in numbers)))
        assert all(isinstance(each, Inserted) for each in recorded)

    def __call__(self, name: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._plain.delay(number)

    # -- in the worker ---------------------------------------------------------------------------------------------------------

    def run(self, number: int, body: Callable[[int], None]) -> None:
        """Claim the message, run the body, complete the message."""
        if self._send is None:
            self._send = self._learn()
        claim, complete = (self._about(f"{number:07}", statement) for statement in self._statements)
        assert self._send(claim), f"{number} was not claimed"
        body(number)
        assert self._send(complete), f"{number} was not completed"

    def _learn(self) -> Callable[[Statement], object]:
        with self._driver.recording() as statements, closing(open_store(self._url)) as store:
            # The first one loads what there is to load.
            for message in self._messages((f"{os.getpid()}.first", f"{os.getpid()}.pattern")):
                self._learnt = message.key
                store.record(message)
                statements.clear()
                answer = store.claim(message, worker="celery@localhost/12345", lease=60.0, grace=10.0)
                assert isinstance(answer, Claimed)
                assert store.complete(answer.claim, result=None)
            self._statements = list(statements)
            assert len(self._statements) == 2, f"{len(self._statements)} statements"
            return self._kept.enter_context(self._driver.connect(store, self._url))

    def _messages(self, names: Iterable[str]) -> Iterator[NewMessage]:
        message = PreparedCall.of(self._guarded, (1,), {}, None, {}).message
        for name in names:
            key = replace(message.key, message_id=f"between:{name}")
            # The same arguments for all, or the statements would differ in more than a name.
            yield replace(message, key=key, task_id=key.message_id)

    def _about(self, name: str, statement: Statement) -> Statement:
        """Return the statement with another message in the place of the one that it was learnt of."""
        key = replace(self._learnt, message_id=f"between:{name}")
        names = {self._learnt.message_id: key.message_id}
        # On Redis the shard is named too.
        shards = {self._layout.tag(identity(self._learnt)): self._layout.tag(identity(key))}

        def renamed(value: Any) -> Any:
            match value:
                case str():
                    return names.get(value, value)
                case bytes():
                    ((old, new),) = names.items()
                    return shards.get(value) or value.replace(old.encode(), new.encode())
                case dict():
                    return {column: renamed(each) for column, each in value.items()}
                case tuple():
                    return tuple(renamed(each) for each in value)
            return value

        args, options = statement
        # The text of a SQL statement names no message, and neither does the name of a command or of a script.
        return (*(each if isinstance(each, str) else renamed(each) for each in args),), options
