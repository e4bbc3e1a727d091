"""What the web server does when a customer sends the form in."""

from __future__ import annotations

from sqlalchemy.orm import Session

from celery_idempotent import outbox
from example_project import ledger
from example_project.tasks import check_loan


class NoConsentError(Exception):
    """Without the customer's consent no institution may be asked, and nothing may be kept."""


def ask_for_loan(session: Session, request_id: str, customer: str, amount: int, *, consent: bool) -> bool:
    """Write a request down and have it checked: both, or neither.

    The call is recorded in the transaction, and published once that has committed: by this process, or, should it die first, by
    any worker.

    Returns:
        Whether the customer had not asked before.

    Raises:
        NoConsentError: The session is to be rolled back, and the call with it.
    """
    with outbox(session):
        first = not check_loan.delay(request_id, customer, amount).duplicate
        if first:
            session.execute(ledger.requests.insert().values(request_id=request_id, customer=customer, amount=amount))
        if not consent:  # found out when the call is made already, as such things are
            raise NoConsentError
        session.commit()
    return first
