"""The callers: ``python -m example_project.demo.callers 0.4 1 2 3`` has customers 1, 2 and 3 ask, some of them twice.

Between one customer and the next pass 0.4 seconds.
"""

from __future__ import annotations

import sys
import time

import example_project.demo.faults  # noqa: F401 - what a caller publishes is delivered twice too
from example_project.celery_app import settings
from example_project.demo.accounts import calls
from example_project.demo.scenario import Request
from example_project.ledger import Ledger
from example_project.tasks import check_loan


def ask_for_loans(pace: float, *numbers: int) -> None:
    book = Ledger(settings.store)
    for request in map(Request, numbers):
        # A caller who calls again could not know whether the first call had arrived.
        for _ in range(request.trouble.calls):
            book.append(calls, request_id=request.id_in(settings.run))
            check_loan.delay(request.id_in(settings.run), request.customer, request.amount)
        time.sleep(pace)


if __name__ == "__main__":
    ask_for_loans(float(sys.argv[1]), *map(int, sys.argv[2:]))
