"""Ask the store again while it gives no answer, in the places where a caller can wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, TypeVar

from kombu.utils.functional import retry_over_time

from celery_idempotent.core.backoff import Backoff
from celery_idempotent.errors import StoreError, StoreUnavailableError

__all__ = ["REDELIVER_AFTER", "WAIT_IN_PLACE", "ask_again", "ask_until_answered", "ask_until_deadline"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")

#: Seconds for which a consumer waits for the store in place, which keeps it from taking more messages it could not guard.
WAIT_IN_PLACE = 10.0

#: Seconds after which a message is delivered again that could not be claimed in that time.
REDELIVER_AFTER = 10.0

_BACKOFF = Backoff(0.1, longest=2.0)
_COMPLAIN_EVERY = 30.0


def ask_again(ask: Callable[[], T], policy: Mapping[str, Any], *, silence: StoreUnavailableError | None = None) -> T:
    """Ask, and repeat as a producer repeats a publication.

    Args:
        ask: One call of the store.
        policy: Celery's ``task_publish_retry_policy``: seconds and counts that the caller already knows from a broker that is down.
        silence: What the first attempt ended with, if that was made already.

    Raises:
        StoreUnavailableError: The last attempt's.
    """
    first = silence

    def attempt() -> T:
        nonlocal first
        if first is None:
            return ask()
        error, first = first, None
        raise error

    answer: T = retry_over_time(
        attempt,
        StoreUnavailableError,
        max_retries=policy.get("max_retries", 3),
        interval_start=policy.get("interval_start", 0),
        interval_step=policy.get("interval_step", 0.2),
        interval_max=policy.get("interval_max", 0.2),
    )
    return answer


def ask_until_deadline(ask: Callable[[], T], what: str, whose: object, wait: Callable[[], float]) -> T:
    """Ask, and repeat with growing pauses for some seconds; but once the store may have heard, until it answers.

    A claim may stand although its answer was lost, or a frozen server may still carry it out. Giving up then would leave a message that is
    claimed and never runs.

    Args:
        ask: One call of the store.
        what: What is asked for, for the log.
        whose: For whom; converted to text only if there is something to log.
        wait: How many seconds; asked only if the store gave no answer.

    Raises:
        StoreUnavailableError: The last attempt's; none of them reached the store.
    """
    began, deadline = time.monotonic(), None
    for failures in count(1):
        try:
            return ask()
        except StoreUnavailableError as error:
            if not error.unsent:
                break
            if deadline is None:
                deadline = began + wait()
            pause = _BACKOFF.pause(failures)
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
    return ask_until_answered(ask, what, whose)


def ask_until_answered(
    ask: Callable[[], T],
    what: str,
    whose: object,
    *,
    silences: tuple[type[StoreError], ...] = (StoreUnavailableError,),
) -> T:
    """Ask until there is an answer, complaining in the log meanwhile.

    For the end of a body that has run: giving up would leave its row ``processing``, and the message would run again.

    Args:
        ask: One call of the store.
        what: What is asked for, for the log.
        whose: For whom; converted to text only if there is something to log.
        silences: Errors after which it is asked again.
    """
    complained: float | None = None
    failures = 0
    while True:
        try:
            return ask()
        except silences as error:
            now = time.monotonic()
            if complained is None or now - complained >= _COMPLAIN_EVERY:
                complained = now
                logger.error("cannot %s %s, asking again until the store answers: %s", what, whose, error)
        failures += 1
        time.sleep(_BACKOFF.pause(failures))
