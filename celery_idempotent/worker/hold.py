"""Hold a copy: publish it again with a countdown, before this delivery is acknowledged."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from kombu.exceptions import OperationalError
from kombu.utils.functional import retry_over_time

from celery_idempotent.core.backoff import Backoff

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context

    from celery_idempotent.producer.guarded import Guarded

__all__ = ["hold_countdown", "hold_delay", "publish_copy"]

logger = logging.getLogger("celery_idempotent")

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
