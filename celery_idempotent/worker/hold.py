"""Hold a copy: publish it again with a countdown, before this delivery is acknowledged."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from celery.exceptions import Reject
from kombu.exceptions import OperationalError
from kombu.utils.functional import retry_over_time

from celery_idempotent.core.backoff import Backoff
from celery_idempotent.core.records import MessageKey, Row
from celery_idempotent.errors import AlreadyProcessingError, StoreUnavailableError
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.worker.delivered_message import DeliveredMessage
from celery_idempotent.worker.events import DuplicateIgnored

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context

    from celery_idempotent.producer.guarded import Guarded

__all__ = ["SETTLE", "hold", "hold_countdown", "hold_delay", "hold_while_it_runs"]

logger = logging.getLogger("celery_idempotent")

#: Seconds to hold a message whose row kept changing.
SETTLE = 1.0

#: Seconds of a copy's first hold while its message runs. Each further hold is twice as long, up to the decision's limit.
_FIRST_HOLD = 1.0

#: Seconds. To quorum queues, Celery publishes whole seconds only, and raises ValueError for less than one.
_SHORTEST_HOLD = 1.0

#: Seconds by which copies of one message are spread at most; a tenth of the delay if that is less.
_JITTER = 1.0

#: Seconds after which a broker delivers an unacknowledged message again, by the defaults of kombu or RabbitMQ. RabbitMQ's
#: ``consumer_timeout`` also closes the worker's channel.
_VISIBILITY_TIMEOUT = {
    **dict.fromkeys(("redis", "rediss", "sentinel"), 3600),
    **dict.fromkeys(("sqs", "amqp", "amqps", "pyamqp"), 1800),
}


def hold(delivered: DeliveredMessage, delay: float, row: Row | None = None) -> Exception:
    """Publish a delayed copy, so that this one can be acknowledged; return what to end the delivery with.

    Nothing is published to a fanout exchange again, because each worker would get a copy. ``_give_back`` handles such messages, and
    those that cannot be published.

    On Redis a restored copy shares its delivery tag with the running original: acknowledging either deletes the broker's
    only copy. The delayed copy is a separate message, published before the acknowledgement.
    """
    task, run = delivered.task, delivered.run
    countdown = hold_countdown(task.app, delay)
    if delivered.is_broadcast:
        return _give_back(delivered, row)
    logger.info("%s is held for %.1f s", run, countdown)
    try:
        publish_copy(task, delivered.request, run.header.message_id, countdown)
    except Exception as error:  # noqa: BLE001 - after any error: acknowledged without its copy, the message would be lost
        logger.error("%s cannot be held by publishing a copy: %r", run, error)
        return _give_back(delivered, row)
    run.emit(OutcomeKind.HELD, row, delay=countdown)
    running = row is None or delivered.is_of(row)
    return DuplicateIgnored(
        f"{run} is held for {countdown:.1f} s", delivered.message.key, "held", running, countdown=countdown
    )


def hold_while_it_runs(delivered: DeliveredMessage, row: Row, limit: float) -> Exception:
    """Hold a copy while another delivery runs or may come; return what to end this delivery with.

    Args:
        delivered: The copy.
        row: The row that it found.
        limit: Seconds for which the decision holds it at most.
    """
    header = delivered.header
    if delivered.request.is_eager:
        # No broker can hold it, and the caller is in this process.
        return AlreadyProcessingError(row.key.message_id, limit)
    # Most owners end long before their lease does, and a caller may wait for this copy's result.
    delay = hold_delay(limit, header.holds)
    # If the id is free again before the copy comes back, this still identifies it as a copy.
    first = header.original_task_id or (None if row.task_id == delivered.request.id else row.task_id)
    delivered.mark(holds=header.holds + 1, original_task_id=first)
    return hold(delivered, delay, row)


def _give_back(delivered: DeliveredMessage, row: Row | None) -> Exception:
    """Give back a message that cannot be held by publishing a copy: to the broker if not yet acknowledged, else to its row."""
    if delivered.task.acks_late and (not delivered.is_broadcast or row is None):
        time.sleep(SETTLE)  # the broker delivers it again at once
        back: Exception = Reject("it is given back, since it cannot be held", requeue=True)
        return back
    key, running = delivered.message.key, row is None or delivered.is_of(row)
    if not delivered.is_broadcast:
        own = MessageKey(delivered.request.id, delivered.task.name)
        if own != key:
            # Already acknowledged: record it under its own key, so that recovery publishes it. See ADR 5.
            delivered.store.record(replace(delivered.adopted(), key=own, published=False))
        logger.error("%s is left to recovery", delivered)
    elif row is not None:
        delivered.store.count_duplicate(row.key)
    else:
        return StoreUnavailableError(
            f"{delivered} was broadcast and has been acknowledged, so it cannot wait for the store"
        )
    return DuplicateIgnored(f"{delivered} is left to its row", key, "skipped", running)


def hold_delay(decided: float, holds: int) -> float:
    """Return the seconds for which a copy is held.

    Holds are short at first: most bodies end long before their lease does, and a caller may wait for this copy's result.

    Args:
        decided: The decision's limit.
        holds: How often the copy has been held.
    """
    return Backoff(_FIRST_HOLD, longest=decided).pause(holds + 1)


def hold_countdown(app: Celery, delay: float) -> float:
    """Return the countdown in seconds for a hold of ``delay`` seconds, within what the app's broker allows."""
    jitter = random.uniform(0, min(_JITTER, delay / 10 + 0.1))  # noqa: S311 - spreads copies, keeps no secret
    countdown = max(delay + jitter, _SHORTEST_HOLD)
    conf = app.conf
    url = conf.broker_url[0] if isinstance(conf.broker_url, list) else conf.broker_url
    scheme = (url or "").partition(":")[0]
    timeout = (conf.broker_transport_options or {}).get("visibility_timeout", _VISIBILITY_TIMEOUT.get(scheme))
    if timeout:
        # A copy that waits in a worker is unacknowledged, so it must not wait past the broker's timeout.
        countdown = min(countdown, float(timeout) / 2)
    return countdown


def publish_copy(task: Guarded, request: Context, message_id: str, countdown: float) -> None:
    """Publish a copy, and repeat until the broker takes it. If this delivery were acknowledged without it, the message would be lost.

    Args:
        task: The task.
        request: The delivery.
        message_id: The id that the message travels under.
        countdown: Seconds until the copy may run.
    """

    def complain(error: Exception, pauses: Iterator[float], _: int) -> float:
        logger.error("%s[%s] cannot be held, trying again: %s", task.name, message_id, error)
        return next(pauses)

    retry_over_time(
        partial(task.publish_copy, request, message_id, countdown),
        OperationalError,
        errback=complain,
        interval_start=0.5,
        interval_step=0.5,
        interval_max=5.0,
    )
