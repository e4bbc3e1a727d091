"""Publish messages after their commit, from the process that committed them.

A message of the outbox is in its row before it is published, so no failure here loses it: the relay (see
:mod:`celery_idempotent.producer.relay`) publishes the rest. The caller has committed, so nothing here may raise, or block for long.
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

#: Seconds to wait for a silent broker, if its transport has an option for that.
ANSWER = 5.0

#: Reconnect once if the connection has broken since its last use. If the broker is down, leave the messages to the relay.
_RETRY_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}

#: Messages per round trip to the broker, if the transport can send several.
_TOGETHER = 100

#: Pauses after a failure, in which this process publishes nothing.
_BACKOFF = Backoff(1.0, longest=60.0)

#: Transport options that limit a driver's waits to ``ANSWER``.
_TIMEOUTS: Mapping[str, Mapping[str, float]] = {
    "redis": {"socket_timeout": ANSWER, "socket_connect_timeout": ANSWER},
    "py-amqp": {"read_timeout": ANSWER, "write_timeout": ANSWER},
}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message of the outbox, on its way to the broker.

    Attributes:
        key: The key of its row; for a copy's own row, that is its task id.
        task: The task.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        header: Its header.
        due: When it may run; ``None`` for at once.
        options: The other options of ``apply_async``.
        emit: Reports the call's outcome to the app's hooks, after the commit.
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
            backend.on_task_call(producer, self.header.task_id)  # rpc:// declares the queue for the answer here
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
    """Publish the messages that a process has committed, in order.

    After a failure, pause for a while, and resume when the messages left to the relay have been published.

    Args:
        queue_log: The queue log; its app publishes.
    """

    def __init__(self, queue_log: QueueLog) -> None:
        self._queue_log = queue_log
        #: The last message that was left to the relay, which publishes in order: all earlier ones come before it.
        self._last_left: MessageKey | None = None
        self._failures = 0
        self._not_before = 0.0

    @classmethod
    def of(cls, queue_log: QueueLog) -> Publisher:
        """Return the queue log's one publisher in this process."""
        return queue_log.part(cls, lambda: cls(queue_log))

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """Hand committed messages to the broker, and note it in their rows; leave the rest to the relay.

        Never raises if the broker or the store fails, because the caller has committed.
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
        except Exception as error:  # noqa: BLE001 - the rows are committed, so no error may reach the caller
            self._failures += 1
            self._not_before = time.monotonic() + _BACKOFF.pause(self._failures)
            logger.error("%d committed messages are left to the relay: %r", len(messages) - len(sent), error)
        self._note(sent, [message.key for message in messages[len(sent) :]])

    def count_duplicate(self, key: MessageKey) -> None:
        """Count a duplicate that was found in a transaction, after its commit."""
        try:
            self._queue_log.store.count_duplicate(key)
        except StoreError as error:
            logger.warning("a duplicate of %s was not counted: %s", key, error)

    def _has_caught_up(self) -> bool:
        """Return whether all messages left to the relay have been published; relay them first if the pause is over."""
        if self._last_left is None:
            return True
        if time.monotonic() < self._not_before:
            return False
        # Its limited waits are for these messages too: the caller has committed, and does not wait for a silent broker.
        with producers[self._connection].acquire(block=True) as producer:
            relay(self._queue_log, producer=producer)
        last = self._queue_log.store.find(self._last_left)
        return last is None or last.published_at is not None or last.status is not Status.PENDING

    def _note(self, sent: list[MessageKey], left: list[MessageKey]) -> None:
        if left:
            self._last_left = left[-1]
        try:
            self._queue_log.store.relayed(sent, published=True)
            self._queue_log.store.relayed(left, published=False)
        except StoreError as error:
            # The sent ones are relayed again, which the claim absorbs; the others once `PUBLISH_WITHIN` is over.
            logger.warning(
                "could not note which of %d committed messages were published: %s", len(sent) + len(left), error
            )

    @cached_property
    def _connection(self) -> Connection:
        """A connection to the app's broker with limited waits; it is never opened itself."""
        app = self._queue_log.app
        timeouts = _TIMEOUTS.get(app.connection_for_write().transport.driver_name, {})
        return app.connection_for_write(transport_options={**timeouts, **(app.conf.broker_transport_options or {})})


def _hand_over(messages: Sequence[Outgoing], producer: Producer, sent: list[MessageKey]) -> None:
    """Hand messages to the broker, in one round trip if kombu can (5.7, Redis); add those that the broker took to ``sent``."""
    if len(messages) > 1 and getattr(producer, "supports_batch_publish", False):
        began = time.monotonic()
        try:
            # A limit that is never reached, so that nothing is sent before the end.
            with producer.batch(max_size=10 * len(messages)):
                for message in messages:
                    message.publish(producer)
        except Exception as error:
            if time.monotonic() - began >= ANSWER:  # a silent broker would not answer single messages either
                raise
            # In a batch, kombu does not reconnect a broken connection, and does not say which messages got through. So publish each on
            # its own: claims absorb the copies, and any other error shows again, with its message.
            logger.info("publishing %d messages one by one: %r", len(messages), error)
        else:
            sent.extend(message.key for message in messages)
            return
    for message in messages:
        message.publish(producer)
        sent.append(message.key)
