"""The loan check, from the customer's question to the message and the filing.

::

                  +-> ask First Bank ------+
    check_loan ---+-> ask Harbour Credit --+--> decide ---+--> tell_customer
                  +-> ask ... -------------+              +--> file_with_agency

Each task names its message: a request is checked once, an institution is asked once per request, and however often the
message is delivered, the customer hears once and the agency files once.

Where what a task does is in our own database it is ``atomic``: its rows, the messages that it sends and the note that it is done are
one commit. Each of those does what is slow first, and writes at its end: SQLite has one writer at a time.
"""

from __future__ import annotations

from typing import Any

from celery import chord

from celery_idempotent import current_message
from example_project import ledger, outside
from example_project.celery_app import app, settings

book = ledger.Ledger(settings.store)


@app.task(bind=True, atomic=True, message_id="loan:{request_id}", on_duplicate="skip")
def check_loan(self: Any, request_id: str, customer: str, amount: int) -> None:
    """Ask every institution at once whether the customer can get a loan; the customer need not wait."""
    asks = [ask.s(request_id, institution, amount) for institution in outside.INSTITUTIONS]
    chord(asks)(decide.s(request_id, customer, amount))
    self.connection.execute(ledger.checks.insert().values(request_id=request_id))


@app.task(bind=True, message_id="ask:{request_id}:{institution}", max_retries=3)
def ask(self: Any, request_id: str, institution: str, amount: int) -> float | None:
    """Ask one institution, and again when it does not answer; the one that never answers makes no offer.

    Not atomic: a retry would roll back the note that there was no answer.
    """
    attempt = self.request.retries
    enquiry = {"request_id": request_id, "institution": institution, "attempt": attempt}
    try:
        rate = outside.enquire(institution, amount, attempt=attempt)
    except outside.InstitutionUnavailableError as error:
        if attempt == self.max_retries:
            book.append(ledger.enquiries, **enquiry, answer="given up")
            return None
        book.append(ledger.enquiries, **enquiry, answer="unavailable")
        raise self.retry(exc=error, countdown=0.3) from error
    book.append(ledger.enquiries, **enquiry, answer="refused" if rate is None else "offer", rate=rate)
    return rate


@app.task(bind=True, atomic=True, message_id="decide:{request_id}")
def decide(self: Any, rates: list[float | None], request_id: str, customer: str, amount: int) -> None:
    """Every institution has answered: tell the customer, and file with the agency."""
    offers = [rate for rate in rates if rate is not None]
    best = min(offers, default=None)
    answer = f"You can have {amount} at {best}%." if best is not None else f"Nobody lends you {amount}."
    tell_customer.delay(request_id, customer, answer)
    file_with_agency.delay(request_id, amount, best)
    self.connection.execute(ledger.decisions.insert().values(request_id=request_id, offers=len(offers)))


@app.task(bind=True, atomic=True, message_id="message:{request_id}")
def tell_customer(self: Any, request_id: str, customer: str, text: str) -> None:
    """Send the customer the answer. Twice would hurt.

    The row is in the commit, and so there once. The gateway is not: killed before its commit, this body hands it the text again. So it is
    given a key that is the same each time, and delivers once.
    """
    message = current_message()
    key = message.message_id if message else self.request.id  # plain Celery has no message, and a task id for each call
    outside.send_text(customer, text, request_id=request_id, key=key)
    self.connection.execute(ledger.messages.insert().values(request_id=request_id, customer=customer, text=text))


@app.task(message_id="filing:{request_id}")
def file_with_agency(request_id: str, amount: int, rate: float | None) -> None:
    """Have the outside agency process the request. Twice would hurt even more.

    The agency takes no key and is in no commit of ours. What is left: killed between its answer and the note that this is done, the
    body files again.
    """
    outside.file(request_id, amount, rate)
