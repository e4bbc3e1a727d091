"""What the app does not control: institutions and an SMS gateway that take their time, and sometimes do not answer.

The same question, asked at the same attempt, always gets the same answer: a run can be repeated.
"""

from __future__ import annotations

import random
import time

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


def send_text(customer: str, text: str) -> None:  # noqa: ARG001 - it is a pretence
    """Send a text message; the gateway answers when it has been delivered."""
    time.sleep(0.2)
