"""Publishing what was recorded and has been committed, from the process that did so.

A message of the outbox is in its row before it is published, so that whatever goes wrong here loses nothing: the relay (see
:mod:`celery_idempotent.producer.relay`) publishes what was not. Nothing here may keep its caller, who has committed, for long, or fail.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kombu.pools import producers

from celery_idempotent.core.backoff import Backoff
from celery_idempotent.core.records import MessageKey, Status
from celery_idempotent.errors import StoreError
from celery_idempotent.producer.recorded import publish
from celery_idempotent.producer.relay import relay

if TYPE_CHECKING:
    from kombu import Connection, Producer

    from celery_idempotent.message.header import Header
    from celery_idempotent.producer.guarded import Guarded
    from celery_idempotent.queue_log import QueueLog

__all__ = ["Outgoing", "Publisher"]

logger = logging.getLogger("celery_idempotent")

#: Seconds for which a broker that says nothing is waited for, where a transport option can say so.
ANSWER = 5.0

#: A connection that broke since it was used last is made anew, once. A broker that is down is for the relay.
_RETRY_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}

#: Messages that go to the broker in one round trip, where that is possible.
_TOGETHER = 100

#: After a failure nothing is published from here for a while.
_BACKOFF = Backoff(1.0, longest=60.0)

#: The transport options by which a driver waits so long and no longer.
_TIMEOUTS: Mapping[str, Mapping[str, float]] = {
    "redis": {"socket_timeout": ANSWER, "socket_connect_timeout": ANSWER},
    "py-amqp": {"read_timeout": ANSWER, "write_timeout": ANSWER},
}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message of the outbox, on its way to the broker.

    Attributes:
        key: Its row's: a copy's own one is known by its task id.
        task: The task.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        header: What its header says.
        due: When it may run; ``None`` for at once.
        options: The other options of ``apply_async``.
        emit: Tells the app's hooks that it was recorded, or what else it comes to.
    """

    key: MessageKey
    task: Guarded
    args: Any
    kwargs: Any
    header: Header
    due: datetime | None
    options: Mapping[str, Any]
    emit: Callable[[], None] | None = None

    def publish(self, producer: Producer | None) -> None:
        """Hand it to the broker."""
        options = {**self.options}
        ignored = options.pop("ignore_result", None)
        ignored = self.task.ignore_result if ignored is None else ignored
        backend = self.task.backend
        if producer is not None and not ignored and not backend.persistent:
            backend.on_task_call(producer, self.header.task_id)  # rpc:// makes the queue for the answer then
        publish(
            self.task,
            self.args,
            self.kwargs,
            header=self.header,
            due_in=None if self.due is None else (self.due - self.task.app.now()).total_seconds(),
            ignore_result=ignored,
            producer=producer,
            retry=True,
            retry_policy=_RETRY_ONCE,
            **options,
        )

    def __str__(self) -> str:
        return str(self.key)


class Publisher:
    """Publishes what a process has committed, in its order.

    After a failure it keeps quiet for a while, and goes on when what was left behind has been relayed.

    Args:
        queue_log: The queue log; its app publishes.
    """

    def __init__(self, queue_log: QueueLog) -> None:
        self._queue_log = queue_log
        #: The last message that was left to the relay: those before it are relayed before it.
        self._last_left: MessageKey | None = None
        self._failures = 0
        self._not_before = 0.0

    @classmethod
    def of(cls, queue_log: QueueLog) -> Publisher:
        """Return the queue log's one publisher in this process."""
        return queue_log.part(cls, lambda: cls(queue_log))

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """Hand committed messages to the broker, and note it; what cannot be is left to the relay.

        Never raises for the broker's or the store's sake: the caller has committed.
        """
        if self._queue_log.app.conf.task_always_eager:
            for message in messages:
                message.publish(None)
            return
        sent: list[MessageKey] = []
        try:
            if self._has_caught_up():
                with producers[self._connection].acquire(block=True) as producer:
                    for first in range(0, len(messages), _TOGETHER):
                        _hand_over(messages[first : first + _TOGETHER], producer, sent)
                self._last_left, self._failures = None, 0
        except Exception as error:  # noqa: BLE001 - whatever it is, the rows are there, and their caller has done his part
            self._failures += 1
            self._not_before = time.monotonic() + _BACKOFF.pause(self._failures)
            logger.error("%d committed messages are left to the relay: %r", len(messages) - len(sent), error)
        self._note(sent, [message.key for message in messages[len(sent) :]])

    def count_duplicate(self, key: MessageKey) -> None:
        """Count one that was found in a transaction which has committed since."""
        try:
            self._queue_log.store.count_duplicate(key)
        except StoreError as error:
            logger.warning("a duplicate of %s was not counted: %s", key, error)

    def _has_caught_up(self) -> bool:
        """Return whether nothing that was left behind waits to be published first."""
        if self._last_left is None:
            return True
        if time.monotonic() < self._not_before:
            return False
        relay(self._queue_log)
        last = self._queue_log.store.find(self._last_left)
        return last is None or last.published_at is not None or last.status is not Status.PENDING

    def _note(self, sent: list[MessageKey], left: list[MessageKey]) -> None:
        if left:
            self._last_left = left[-1]
        try:
            self._queue_log.store.relayed(sent, published=True)
            self._queue_log.store.relayed(left, published=False)
        except StoreError as error:
            # Relayed once more, which the claim absorbs; or when the right to publish them has run out.
            logger.warning("what became of %d committed messages is not noted: %s", len(sent) + len(left), error)

    @cached_property
    def _connection(self) -> Connection:
        """To the app's broker, but with an end to the patience; never opened itself."""
        app = self._queue_log.app
        timeouts = _TIMEOUTS.get(app.connection_for_write().transport.driver_name, {})
        return app.connection_for_write(transport_options={**timeouts, **(app.conf.broker_transport_options or {})})


def _hand_over(messages: Sequence[Outgoing], producer: Producer, sent: list[MessageKey]) -> None:
    """Hand some messages to the broker, in one round trip where kombu has that (5.7, Redis), and add those that it has to ``sent``."""
    if len(messages) > 1 and getattr(producer, "supports_batch_publish", False):
        began = time.monotonic()
        try:
            # More commands than it can come to, so that nothing goes out on the way.
            with producer.batch(max_size=10 * len(messages)):
                for message in messages:
                    message.publish(producer)
        except Exception as error:
            if time.monotonic() - began >= ANSWER:  # it says nothing, and would say nothing to each of them
                raise
            # kombu does not mend a connection that broke in the meantime, and nobody can tell what got through. Copies are absorbed; and what
            # else it may have been shows again, with the message that it is about.
            logger.info("%d messages are published one by one: %r", len(messages), error)
        else:
            sent.extend(message.key for message in messages)
            return
    for message in messages:
        message.publish(producer)
        sent.append(message.key)
