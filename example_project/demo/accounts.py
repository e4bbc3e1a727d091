"""The accounts of a run, from the tables: what was sent, what ran, what was skipped, and whether it adds up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Column, MetaData, String, select

from celery_idempotent import queue_log_table
from example_project import ledger
from example_project.ledger import Ledger
from example_project.outside import INSTITUTIONS
from example_project.settings import Settings

#: How often a caller called the task, other than in a transaction that was rolled back with the call.
calls = ledger.table("calls")
#: A message that was put on the broker once more.
copies = ledger.table("copies", Column("task_name", String(128)), Column("task_id", String(64)))

TASKS = "example_project.tasks."
queue_log = queue_log_table(MetaData()).c


@dataclass(frozen=True)
class Message:
    """A row of the queue log.

    Attributes:
        request_id: The request it is about.
        institution: To whom it is, if to an institution; else empty.
        task: The task's short name.
        status: As in the table, and the next three.
        processed_status: As in the table.
        attempt: As in the table.
        duplicates: As in the table.
        on_the_way: Seconds from when it was recorded until it was handed to the broker; ``None`` if it was not.
    """

    request_id: str
    institution: str
    task: str
    status: str
    processed_status: str | None
    attempt: int
    duplicates: int
    on_the_way: float | None

    @classmethod
    def read(cls, settings: Settings, book: Ledger) -> list[Message]:
        """Return the messages of a run."""
        query = select(
            queue_log.message_id,
            queue_log.task_name,
            queue_log.status,
            queue_log.processed_status,
            queue_log.attempt,
            queue_log.duplicates,
            queue_log.created_timestamp,
            queue_log.published_at,
        ).where(queue_log.queue == settings.queue, queue_log.task_name.startswith(TASKS, autoescape=True))
        messages = []
        for message_id, task_name, status, processed_status, attempt, duplicates, recorded, published in book.read(
            query
        ):
            _, request_id, institution = f"{message_id}:".split(":")[:3]
            task = task_name.removeprefix(TASKS)
            on_the_way = None if published is None else (published - recorded).total_seconds()
            messages.append(
                cls(request_id, institution, task, status, processed_status, attempt, duplicates, on_the_way)
            )
        return messages


@dataclass(frozen=True)
class Step:
    """The account of one task of a run; each counter is by request.

    Attributes:
        name: The task.
        sent: Copies of its messages that were handed to Celery or to the broker.
        run: Bodies that ran to their end.
        recorded: Rows of the queue log that ended in success; ``None`` without a queue log.
        skipped: Copies that the queue log counted as duplicates; empty without a queue log.
    """

    name: str
    sent: Counter[str]
    run: Counter[str]
    recorded: Counter[str] | None
    skipped: Counter[str]

    @property
    def lost(self) -> int:
        """Copies of which nothing came, or nothing yet."""
        return (self.sent - (self.run + self.skipped)).total()

    @property
    def returned(self) -> int:
        """Copies beyond those that were sent: a broker delivered again what a worker had, or its row was published again."""
        return ((self.run + self.skipped) - self.sent).total()

    @property
    def balanced(self) -> bool:
        """Whether every copy is accounted for, and the queue log agrees with the tables of the business."""
        return not self.lost and self.recorded in (None, self.run)


@dataclass(frozen=True)
class Accounts:
    """Everything that a run's tables say.

    Attributes:
        steps: The account of each task.
        requests: How many rows the web server wrote for each request.
        messages: How many rows say what each request's customer was told.
        texts: How many texts the gateway delivered for each request: one for each key.
        handed: How many texts the gateway was handed.
        filings: How many filings the agency processed for each request.
        unanswered: How often an institution did not answer and was asked again.
    """

    steps: tuple[Step, ...]
    requests: Counter[str]
    messages: Counter[str]
    texts: Counter[str]
    handed: int
    filings: Counter[str]
    unanswered: int

    @classmethod
    def read(cls, settings: Settings, book: Ledger) -> Accounts:
        """Count a run's rows.

        The later a step, the earlier it is read: while tasks still run, less can appear to have run than was sent, never
        more, and a run that is balanced has come to rest.
        """
        log = Message.read(settings, book) if settings.base == "guarded" else None
        of_run = f"{settings.run}-"
        filings = by_request(book.count(ledger.filings, of_run, "request_id"))
        messages = by_request(book.count(ledger.messages, of_run, "request_id"))
        handed = book.count(ledger.texts, of_run, "request_id", "idempotency_key")
        decided = by_request(book.count(ledger.decisions, of_run, "request_id"))
        enquiries = book.count(ledger.enquiries, of_run, "request_id", "answer")
        checked = by_request(book.count(ledger.checks, of_run, "request_id"))
        requests = by_request(book.count(ledger.requests, of_run, "request_id"))
        called = by_request(book.count(calls, of_run, "request_id"))
        copied = book.count(copies, of_run, "request_id", "task_name")
        unanswered = Counter({key: number for key, number in enquiries.items() if key[1] == "unavailable"})

        def step(name: str, *, sent: Counter[str], run: Counter[str]) -> Step:
            sent = sent + by_request({key: number for key, number in copied.items() if key[1] == TASKS + name})
            if log is None:
                return Step(name, sent, run, None, Counter())
            ours = [message for message in log if message.task == name]
            recorded = Counter(message.request_id for message in ours if message.processed_status == "success")
            return Step(name, sent, run, recorded, _sum((message.request_id, message.duplicates) for message in ours))

        steps = (
            step("check_loan", sent=called, run=checked),
            step("ask", sent=_sum(list(checked.items()) * len(INSTITUTIONS)), run=by_request(enquiries - unanswered)),
            step("decide", sent=checked, run=decided),
            step("tell_customer", sent=decided, run=messages),
            step("file_with_agency", sent=decided, run=filings),
        )
        delivered = Counter(request_id for request_id, _ in handed)
        return cls(steps, requests, messages, delivered, handed.total(), filings, unanswered.total())

    def balanced(self) -> bool:
        """Return whether every copy of every message is accounted for."""
        return all(step.balanced for step in self.steps)


def by_request(counted: Counter[tuple[str, ...]] | dict[tuple[str, ...], int]) -> Counter[str]:
    """Return what was counted by request and more, by request."""
    return _sum((request_id, number) for (request_id, *_), number in counted.items())


def _sum(numbers: Iterable[tuple[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for name, number in numbers:
        total[name] += number
    return total
