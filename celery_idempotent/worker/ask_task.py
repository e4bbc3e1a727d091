"""Ask a task what became of a message whose owner's lease ran out: ``on_abandoned`` as a callable."""

from __future__ import annotations

import logging

from celery_idempotent.core.abandoned import Answer, Done
from celery_idempotent.core.backoff import Backoff
from celery_idempotent.core.records import Row
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.producer.guarded import RUN
from celery_idempotent.worker.delivered_message import DeliveredMessage
from celery_idempotent.worker.hold import hold
from celery_idempotent.worker.record_original import note_original

__all__ = ["ask_task"]

logger = logging.getLogger("celery_idempotent")

#: Seconds until the task is asked again after it gave no answer.
_AGAIN_AFTER = Backoff(10.0, longest=300.0)


def ask_task(delivered: DeliveredMessage, row: Row) -> Answer:
    """Return the task's answer.

    Raises:
        Ignore: It raised, or answered anything else. The message comes again.
        Exception: The same in an eager call: what it raised, or ConfigurationError.
    """
    delivered.done = None
    try:
        return _asked(delivered, row)
    except Exception as error:
        if delivered.request.is_eager:
            raise
        logger.exception("%s is left as it is, since on_abandoned gave no answer; it is asked again", delivered)
        holds = delivered.header.holds + 1
        delivered.mark(holds=holds)
        raise hold(delivered, _AGAIN_AFTER.pause(holds), row) from error


def _asked(delivered: DeliveredMessage, row: Row) -> Answer:
    ask = delivered.task.idempotency.ask_abandoned
    assert ask is not None, "the policy says to ask"
    note_original(delivered, row)
    # For the keys of the message's steps: see `step_key`.
    setattr(delivered.request, RUN, delivered.run)
    try:
        answer = ask(row)
    finally:
        delattr(delivered.request, RUN)
    if answer in ("rerun", "fail") or isinstance(answer, Done):
        return answer
    raise ConfigurationError(
        f"on_abandoned of task {delivered.task.name} answered {answer!r}: let it return 'rerun', 'fail' or Done(result)"
    )
