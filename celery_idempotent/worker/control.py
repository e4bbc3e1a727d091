"""``celery -A proj inspect idempotency``: list the claims that a worker holds.

Importing this module registers the command, for a worker and for ``celery inspect``: Celery has one panel of commands per process.
"""

from __future__ import annotations

import logging
import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from celery.worker.control import inspect_command

from celery_idempotent.worker.lease_renewal import LeaseRenewer

if TYPE_CHECKING:
    from celery_idempotent.core.records import Claim, Row
    from celery_idempotent.queue_log import QueueLog
    from celery_idempotent.worker.lease_renewal import RenewedLease
    from celery_idempotent.worker.request import IdempotentRequest

__all__ = ["claims", "idempotency"]

logger = logging.getLogger("celery_idempotent")

#: Seconds in which rows are read. The worker's event loop gives the answer, and must not wait for long.
_READ_FOR = 0.5


@inspect_command()  # type: ignore[untyped-decorator]
def idempotency(state: Any, **_: Any) -> list[dict[str, Any]]:
    """List the messages that this worker has claimed (celery-idempotent)."""
    queue_log = vars(state.app).get("queue_log")
    return [] if queue_log is None else claims(queue_log)


def claims(queue_log: QueueLog) -> list[dict[str, Any]]:
    """Return the claims that this worker's bodies hold, the oldest first.

    A process knows its own claims. A child's token is known only to the child and the row, so each row is read, in one statement. Children
    that have not claimed yet, or have finished, are left out. If the store does not answer, children are listed without tokens.

    Hazard:
        A silent store blocks the worker's event loop once, for as long as its driver waits. A store that refuses does not block.

    Returns:
        For each claim: ``message_id``, ``task_name``, ``task_id``, ``token``, ``attempt``, ``since`` (when the worker passed it to its
        pool, ISO 8601 in UTC), ``lease`` and ``lease_left`` (seconds), ``pid``.
    """
    from celery_idempotent.core.records import Claim
    from celery_idempotent.worker.request import running

    requests = running()
    by_key = {request.key: request for request in requests}
    found = [
        _own(held, held.holder, by_key.get(held.holder.key))
        for held in LeaseRenewer.of(queue_log).held()
        if isinstance(held.holder, Claim)
    ]
    found += _of_children(queue_log, requests)
    return sorted(found, key=lambda claim: claim["since"] or "")


def _own(held: RenewedLease, claim: Claim, request: IdempotentRequest | None) -> dict[str, Any]:
    """Return a claim of this process; for an eager run there is no request."""
    return {
        "message_id": claim.key.message_id,
        "task_name": claim.key.task_name,
        "task_id": None if request is None else request.id,
        "token": claim.token,
        "attempt": None if request is None else request._context.retries or 0,  # noqa: SLF001
        "since": _since(request),
        "lease": held.lease,
        "lease_left": _left(held),
        "pid": os.getpid(),
    }


def _of_children(queue_log: QueueLog, requests: list[IdempotentRequest]) -> list[dict[str, Any]]:
    from celery_idempotent.core.records import Owner, Status
    from celery_idempotent.errors import StoreError

    found, deadline, answers = [], time.monotonic() + _READ_FOR, True
    for request in requests:
        held = request.held
        if held is None or held.ended or not isinstance(held.holder, Owner):
            continue
        row: Row | None = None
        if answers and time.monotonic() < deadline:
            try:
                row = queue_log.store.find(held.holder.key)
            except StoreError as error:
                logger.warning(
                    "the claims of children are listed without tokens, since the store gives no answer: %s", error
                )
                answers = False
            else:
                if row is None or row.status is not Status.PROCESSING or row.worker != held.holder.worker:
                    continue
        found.append(
            {
                "message_id": held.holder.key.message_id,
                "task_name": held.holder.key.task_name,
                "task_id": request.id,
                "token": None if row is None else row.token,
                "attempt": request._context.retries or 0,  # noqa: SLF001
                "since": _since(request),
                "lease": held.lease,
                "lease_left": _left(held) if row is None else round(row.lease_left, 3),
                "pid": held.pid,
            }
        )
    return found


def _left(held: RenewedLease) -> float:
    """Return the seconds for which a lease lasts at least, from when it was last asked for."""
    return round(held.asked + held.lease - time.monotonic(), 3)


def _since(request: IdempotentRequest | None) -> str | None:
    if request is None or not request.time_start:
        return None
    return datetime.fromtimestamp(request.time_start, UTC).isoformat(timespec="milliseconds")
