"""The verbs by which a worker gets a message, and keeps it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from celery_idempotent.core.records import Claimed, Holder, NewMessage, NotClaimed, Row

__all__ = ["Claimer"]


class Claimer(Protocol):
    """Grants claims and leases."""

    def claim(
        self,
        message: NewMessage,
        *,
        worker: str,
        lease: float,
        grace: float,
        adopt: Callable[[], NewMessage] | None = None,
    ) -> Claimed | NotClaimed:
        """Claim a delivered message, or return the row that prevents it.

        It claims an absent message (and inserts it, for a producer without this library); an id that is free again, unless this is a copy
        of the message that ended (see :meth:`Row.is_free_for`); and a pending message with ``attempt <= message.attempt``, or whose
        ``available_at`` passed more than ``grace`` ago. It never claims a row with another fingerprint (``None`` on either side compares
        equal). ``message.attempt`` is the delivery's ``retries``; the row keeps the greater of both. A claim adds one to the token, clears
        ``processed_status``, ``error`` and ``available_at``, and sets ``ran_task_id`` to ``message.task_id``.

        Args:
            message: The delivery.
            worker: The claimant, as ``host:pid`` or ``host:pid:thread``; at most 255 characters.
            lease: Seconds until others may take over; > 0.
            grace: Seconds after ``available_at`` from which a copy with fewer retries may run too; >= 0.
            adopt: Called if the message is absent; returns the full record (with the encoded message) to insert.
                ``None`` inserts ``message`` as it is.

        Returns:
            ``Claimed`` with a fresh token, or ``NotClaimed`` with the row as it stands.

        Atomicity: one statement for a recorded, pending message; of N concurrent callers exactly one claims.
        """
        ...

    def take_over(self, row: Row, *, task_id: str, worker: str, lease: float, attempt: int) -> Claimed | None:
        """Claim a message from an owner whose lease ran out.

        ``processed_status`` and ``result`` stay: a recovery point is replayed by its new owner. ``attempt`` becomes the
        greater of the row's and the delivery's; ``takeovers`` counts one more, until the next attempt is claimed.

        Args:
            row: The ``processing`` row as it was read.
            task_id: The Celery id of the delivery; it becomes ``ran_task_id``.
            worker: The claimant.
            lease: Seconds until others may take over; > 0.
            attempt: Celery's retry count of the delivery.

        Returns:
            ``Claimed`` with token + 1, or ``None`` if the row has changed or its lease was renewed since.

        Atomicity: one statement (compare and set on the token, and on the lease by the store's clock).
        """
        ...

    def renew(self, holders: Sequence[Holder], *, lease: float) -> list[Holder]:
        """Extend leases to ``lease`` seconds from now. A longer lease stays, and its row is not written.

        Args:
            holders: Runs to keep alive, by their claims or their workers; an empty list runs no query.
            lease: Seconds; > 0.

        Returns:
            The holders that have lost their message: the row has another token or worker, or is not processing.

        Atomicity: each lease separately. A lease that ran out but was not taken over is renewed.
        """
        ...
