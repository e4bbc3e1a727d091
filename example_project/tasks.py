"""The loan check, from the customer's question to the message and the filing.

::

                  +-> ask First Bank ------+
    check_loan ---+-> ask Harbour Credit --+--> decide ---+--> tell_customer
                  +-> ask ... -------------+              +--> file_with_agency

Each task names its message: a request is checked once, an institution is asked once per request, and however often the
message is delivered, the customer hears once and the agency files once.
"""

from __future__ import annotations

from typing import Any

from celery import chord

from example_project import ledger
from example_project.celery_app import app, settings
from example_project.outside import INSTITUTIONS, InstitutionUnavailableError, enquire, send_text

book = ledger.Ledger(settings.store)


@app.task(message_id="loan:{request_id}", on_duplicate="skip")
def check_loan(request_id: str, customer: str, amount: int) -> None:
    """A customer asks: can I get a loan? Ask every institution at once; the customer need not wait."""
    asks = [ask.s(request_id, institution, amount) for institution in INSTITUTIONS]
    chord(asks)(decide.s(request_id, customer, amount))
    book.append(ledger.requests, request_id=request_id, customer=customer, amount=amount)


@app.task(bind=True, message_id="ask:{request_id}:{institution}", max_retries=3)
def ask(self: Any, request_id: str, institution: str, amount: int) -> float | None:
    """Ask one institution, and again when it does not answer; the one that never answers makes no offer."""
    attempt = self.request.retries
    enquiry = {"request_id": request_id, "institution": institution, "attempt": attempt}
    try:
        rate = enquire(institution, amount, attempt=attempt)
    except InstitutionUnavailableError as error:
        if attempt == self.max_retries:
            book.append(ledger.enquiries, **enquiry, answer="given up")
            return None
        book.append(ledger.enquiries, **enquiry, answer="unavailable")
        raise self.retry(exc=error, countdown=0.3) from error
    book.append(ledger.enquiries, **enquiry, answer="refused" if rate is None else "offer", rate=rate)
    return rate


@app.task(message_id="decide:{request_id}")
def decide(rates: list[float | None], request_id: str, customer: str, amount: int) -> None:
    """Every institution has answered: tell the customer, and file with the agency."""
    offers = [rate for rate in rates if rate is not None]
    best = min(offers, default=None)
    answer = f"You can have {amount} at {best}%." if best is not None else f"Nobody lends you {amount}."
    tell_customer.delay(request_id, customer, answer)
    file_with_agency.delay(request_id, amount, best)
    book.append(ledger.decisions, request_id=request_id, offers=len(offers))


@app.task(message_id="message:{request_id}")
def tell_customer(request_id: str, customer: str, text: str) -> None:
    """Send the customer the answer. Twice would hurt."""
    send_text(customer, text)
    book.append(ledger.messages, request_id=request_id, customer=customer, text=text)


@app.task(message_id="filing:{request_id}")
def file_with_agency(request_id: str, amount: int, rate: float | None) -> None:
    """Have the outside agency process the request. Twice would hurt even more."""
    book.append(ledger.filings, request_id=request_id, amount=amount, rate=rate)
