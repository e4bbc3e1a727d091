"""What one delivery asks its store, and what is known of the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from celery_idempotent.core.records import Claimed, NotClaimed, Row, Status
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.worker.delivery import worker_label

__all__ = ["ClaimAnswer", "ClaimRequest"]


@dataclass(frozen=True, slots=True)
class ClaimAnswer:
    """What the store answered.

    Attributes:
        answer: The claim, or the row that stands in its way.
        at: When it was asked, by the monotonic clock.
        seconds: How long it took.
        outcome_unknown: Whether an earlier request of this delivery got no answer, so that what it wrote may stand.
        worker: Under whose label.
    """

    answer: Claimed | NotClaimed
    at: float
    seconds: float
    outcome_unknown: bool
    worker: str

    def is_own(self, row: Row) -> bool:
        """Return whether a row in the way has the claim whose answer did not come: this process runs nothing else under its label."""
        return self.outcome_unknown and row.status is Status.PROCESSING and row.worker == self.worker

    @property
    def granted(self) -> bool:
        """Whether the delivery has the claim that it asked for, now or by an earlier request whose answer did not come."""
        if isinstance(self.answer, Claimed):
            return True
        return self.is_own(self.answer.row) and self.answer.row.lease_left > 0


class ClaimRequest:
    """Asks the store for one delivery's claim.

    Args:
        hostname: The worker's node name.

    Attributes:
        outcome_unknown: Whether a claim of ours may stand, or may yet: the store was asked and its answer did not come.
    """

    def __init__(self, hostname: str | None) -> None:
        self._hostname = hostname
        self.outcome_unknown = False

    def ask(self, ask: Callable[[], Claimed | NotClaimed]) -> ClaimAnswer:
        """Ask once.

        Raises:
            StoreUnavailableError: There was no answer.
        """
        began = time.monotonic()
        answer = ask()
        seconds = time.monotonic() - began
        return ClaimAnswer(answer, began, seconds, self.outcome_unknown, worker_label(self._hostname))

    def note_claim(self) -> None:
        """Note that a claim stands: should a later request get no answer, it is to be found again."""
        self.outcome_unknown = True

    @contextmanager
    def noting_silence(self) -> Iterator[None]:
        """Note of each request whether it may have reached a store that gave no answer."""
        try:
            yield
        except StoreUnavailableError as error:
            self.outcome_unknown = self.outcome_unknown or not error.unsent
            raise
