"""Ask the store for a delivery's claim, and remember whether the outcome is unknown."""

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
    """The store's answer.

    Attributes:
        answer: The claim, or the row that prevents it.
        at: When the store was asked, by the monotonic clock.
        seconds: How long the answer took.
        outcome_unknown: Whether an earlier request of this delivery got no answer, so that its write may have happened.
        worker: The label of the claimant.
    """

    answer: Claimed | NotClaimed
    at: float
    seconds: float
    outcome_unknown: bool
    worker: str

    def is_own(self, row: Row) -> bool:
        """Return whether the row has our own claim, whose answer was lost: this process runs nothing else under its label."""
        return self.outcome_unknown and row.status is Status.PROCESSING and row.worker == self.worker

    @property
    def granted(self) -> bool:
        """Whether the delivery has its claim, by this request or an earlier one whose answer was lost."""
        if isinstance(self.answer, Claimed):
            return True
        return self.is_own(self.answer.row) and self.answer.row.lease_left > 0


class ClaimRequest:
    """Ask the store for one delivery's claim.

    Args:
        hostname: The worker's node name.

    Attributes:
        outcome_unknown: Whether a request got no answer, so that a claim of ours may exist, or may yet be written.
    """

    def __init__(self, hostname: str | None) -> None:
        self._hostname = hostname
        self.outcome_unknown = False

    def ask(self, ask: Callable[[], Claimed | NotClaimed]) -> ClaimAnswer:
        """Ask once.

        Raises:
            StoreUnavailableError: The store did not answer.
        """
        began = time.monotonic()
        answer = ask()
        seconds = time.monotonic() - began
        return ClaimAnswer(answer, began, seconds, self.outcome_unknown, worker_label(self._hostname))

    def note_claim(self) -> None:
        """Note that a claim exists, so that it is recognized as ours if a later request gets no answer."""
        self.outcome_unknown = True

    @contextmanager
    def noting_silence(self) -> Iterator[None]:
        """Note whether a request without an answer may have reached the store."""
        try:
            yield
        except StoreUnavailableError as error:
            self.outcome_unknown = self.outcome_unknown or not error.unsent
            raise
