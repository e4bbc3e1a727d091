"""The callers: ``python -m example_project.demo.callers 0.4 1 2 3`` has customers 1, 2 and 3 ask, some of them twice.

Between one customer and the next pass 0.4 seconds. A customer whose caller dies ends it: SIGKILL, by its own hand, at the moment when
Celery is about to publish.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from celery.signals import before_task_publish

from example_project import ledger
from example_project.celery_app import settings
from example_project.demo.accounts import calls
from example_project.demo.faults import request_of  # and what a caller publishes is delivered twice too
from example_project.demo.scenario import Request
from example_project.tasks import book, check_loan
from example_project.web import NoConsentError, ask_for_loan


def ask_for_loans(pace: float, *numbers: int) -> None:
    ask = ask_guarded if settings.base == "guarded" else ask_plain
    for request in map(Request, numbers):
        # A customer who asks again could not know whether the first time had arrived.
        for _ in range(request.trouble.calls):
            ask(request)
        time.sleep(pace)


def ask_guarded(request: Request) -> None:
    """As the web server does."""
    request_id = request.id_in(settings.run)
    with book.session() as session, suppress(NoConsentError):
        # In the same transaction: a call that is rolled back was never made.
        session.execute(calls.insert().values(request_id=request_id))
        ask_for_loan(session, request_id, request.customer, request.amount, consent=request.trouble.consent)


def ask_plain(request: Request) -> None:
    """Ask without an outbox: a call before the commit, or after it. Each request meets the order that fails it.

    Made before, the call is out when the transaction is rolled back. Made after, as is better, it is lost with a caller that dies in
    between.
    """
    row = {"request_id": request.id_in(settings.run), "customer": request.customer, "amount": request.amount}
    with book.session() as session:
        if not request.trouble.consent:
            call_plainly(row)
            session.execute(ledger.requests.insert().values(row))
            return
        session.execute(ledger.requests.insert().values(row))
        session.commit()
    call_plainly(row)


def call_plainly(row: dict[str, Any]) -> None:
    book.append(calls, request_id=row["request_id"])
    check_loan.delay(*row.values())


@before_task_publish.connect
def die(body: Any, **_: Any) -> None:
    request = request_of(body)
    if request is not None and request.trouble.caller_dies:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    ask_for_loans(float(sys.argv[1]), *map(int, sys.argv[2:]))
