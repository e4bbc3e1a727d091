"""What a user's code looks like. Never run: `make check` has pyright read it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, assert_type

from celery import Celery
from celery.result import AsyncResult
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from celery_idempotent import (
    AlreadyFailedError,
    DuplicateMessageError,
    IdempotentError,
    IdempotentTask,
    MessageMismatchError,
    Outcome,
    OutcomeKind,
    QueueLog,
    RefusedError,
    StoreUnavailableError,
    by_arguments,
    current_message,
    outbox,
)
from celery_idempotent.records import ProcessedStatus, Requeued, Row, Status

app = Celery("shop", broker="redis://localhost", backend="redis://localhost")
app.conf.idempotent_store = "postgresql+psycopg://localhost/shop"


def count(outcome: Outcome) -> None:
    if outcome.kind is OutcomeKind.COMPLETED:
        assert_type(outcome.ran, float | None)
        assert_type(outcome.task_name, str | None)


app.conf.idempotent_hooks = [count, "celery_idempotent.contrib.prometheus.hook"]


@app.task(base=IdempotentTask)
def resize(image_id: int) -> str:
    return f"{image_id}.png"


@app.task(base=IdempotentTask, message_id="order:{order_id}", on_duplicate="raise")
def charge(order_id: str, amount: int) -> None: ...


@app.task(
    base=IdempotentTask,
    bind=True,
    acks_late=True,
    message_id=by_arguments("order_id", exclude=("note?",)),
    on_duplicate="skip",
    on_processing="hold",
    on_abandoned="rerun",
    resubmit_failed=True,
    lease=timedelta(minutes=2),
    unique_for=timedelta(days=1),
    fingerprint=True,
    keep_result=False,
)
def settle(self: IdempotentTask, order_id: str) -> dict[str, Any]:
    return {"order": order_id, "retries": self.request.retries, "worker": self.request.hostname}


@app.task(base=IdempotentTask, bind=True, atomic=True)
def refund(self: IdempotentTask, order_id: str) -> str | None:
    assert_type(self.session, Session)
    assert_type(self.connection, Connection)
    self.session.execute(text("UPDATE orders SET refunded = true WHERE id = :id"), {"id": order_id})
    message = current_message()
    return None if message is None else message.message_id


class Payment(IdempotentTask):
    """Options as attributes; the subclass is the base of several tasks."""

    abstract = True
    acks_late = True
    message_id = "payment:{payment_id}"
    on_duplicate = "raise"
    on_processing = "hold"
    on_abandoned = "rerun"
    resubmit_failed = True
    lease = 90.0
    unique_for = timedelta(hours=6)
    fingerprint = True
    keep_result = True


def of_customer(customer: int, **_: object) -> str:
    return f"customer:{customer}"


class Remind(IdempotentTask):
    """A task as a class, its id from a function."""

    name = "shop.remind"
    message_id = of_customer

    def run(self, customer: int, text: str = "") -> int:
        return customer + len(text)


remind = app.register_task(Remind())


@app.task(base=Payment)
def pay(payment_id: str, amount: int) -> None: ...


def checkout(order_id: str, amount: int) -> str | None:
    """A caller: sends, looks whether it was a duplicate, and copes with each error."""
    first = charge.delay(order_id, amount)
    second = charge.apply_async((order_id, amount), message_id=f"order-{order_id}", countdown=10)
    if second.duplicate:
        return first.id
    try:
        settle.apply_async(args=[order_id], kwargs={})
        pay.delay(payment_id=order_id, amount=amount)
    except DuplicateMessageError as error:
        assert_type(error.message_id, str)
        assert_type(error.task_id, str | None)
        return error.task_id
    except MessageMismatchError as error:
        raise ValueError(error.message_id) from error
    except AlreadyFailedError as error:
        return error.error
    except StoreUnavailableError:
        return None
    except IdempotentError as error:
        raise RuntimeError from error
    return second.id


def by_hand(task: Remind) -> AsyncResult[Any]:
    """Where the task's class is known, so is what its methods take and return."""
    result = task.apply_async((7,), message_id="reminder-7")
    assert_type(result.id, str)
    assert_type(result.message_id, str)
    assert_type(result.duplicate, bool)
    assert_type(task.queue_log, QueueLog)
    return result


def operate(task: Remind) -> list[str]:
    """Finds messages, and gives those that failed another chance."""
    log = QueueLog.of(app)
    row = log.find(task, 7, text="hello") or log.find(charge, "o-1", 500) or log.find_id("shop.charge", "order:o-1")
    assert_type(row, Row | None)
    if row is not None and row.status is Status.DONE and row.processed_status is ProcessedStatus.FAILURE:
        assert_type(log.requeue(row), Requeued)
    again: list[str] = []
    for each in log.rows(
        task=charge, status="done", processed_status="failure", newer_than=timedelta(hours=2), limit=10
    ):
        try:
            again.append(log.requeue(each, publish=False).task_id)
        except RefusedError as error:
            assert_type(error.reason, str | None)
    assert_type(log.requeue(charge, "order:o-1").published, bool)
    assert_type(log.forget("shop.charge", "order:o-1", force=True), bool)
    assert_type(task.apply((7,)).message_id, str)
    return again


def order(session: Session, order_id: str) -> bool:
    """A web request: the order and its message in one commit."""
    with outbox(session):
        result = charge.delay(order_id, 500)
        session.commit()
    with outbox():
        results = [charge.delay(f"o-{number}", 500) for number in range(1000)]
    assert_type(results[0].id, str)
    return result.duplicate


async def order_in_a_coroutine(session: AsyncSession, order_id: str) -> bool:
    """The same in asynchronous code."""
    async with outbox(session):
        result = await charge.adelay(order_id, 500)
        await session.commit()
    async with outbox():
        await charge.aapply_async((order_id, 500), countdown=3)
    return result.duplicate


async def by_hand_in_a_coroutine(task: Remind) -> bool:
    """Where the task's class is known."""
    result = await task.aapply_async((7,), message_id="reminder-7")
    assert_type(result.id, str)
    return result.duplicate


def set_up() -> bool:
    """The queue log of an app."""
    return QueueLog(app, session_factory=sessionmaker(expire_on_commit=False), isolation_level="SERIALIZABLE").init()
