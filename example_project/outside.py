"""What the app does not control: institutions, an SMS gateway and an agency that take their time, and sometimes do not answer.

The same question, asked at the same attempt, always gets the same answer: a run can be repeated.
"""

from __future__ import annotations

import random
import time

from example_project import ledger
from example_project.celery_app import settings

book = ledger.Ledger(settings.store)

INSTITUTIONS = ("First Bank", "Harbour Credit", "Mutual Trust", "Village Union")


class InstitutionUnavailableError(Exception):
    """The institution did not answer; it may later."""


def enquire(institution: str, amount: int, *, attempt: int) -> float | None:
    """Ask an institution for a loan.

    Returns:
        The yearly rate it offers in percent, or ``None``: no loan.

    Raises:
        InstitutionUnavailableError: No answer this time.
    """
    chance = random.Random(f"{institution}/{amount}/{attempt}")
    time.sleep(chance.uniform(0.3, 0.8))
    if chance.random() < 0.25:
        raise InstitutionUnavailableError(institution)
    return None if chance.random() < 0.3 else round(chance.uniform(2.5, 9.0), 2)


def send_text(customer: str, text: str, *, request_id: str, key: str) -> None:  # noqa: ARG001 - it is a pretence
    """Have the SMS gateway send a text; it answers when that was delivered.

    Args:
        customer: To whom.
        text: What.
        request_id: Our reference, which it notes.
        key: It delivers one text for each key, however often it is handed one.
    """
    time.sleep(0.2)
    book.append(ledger.texts, request_id=request_id, idempotency_key=key)


def file(request_id: str, amount: int, rate: float | None) -> None:
    """Have the agency process a request. It processes whatever it is handed, as often as it is."""
    book.append(ledger.filings, request_id=request_id, amount=amount, rate=rate)
