"""Tasks that are broken on purpose, each with its mended twin: a project whose tests are in ``test_each_crash.py``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import Session

from celery_idempotent import IdempotentTask, QueueLog, SQLStore, current_message

HERE = Path(os.environ["BROKEN_TASKS"])
BANK, FILE, MARKER, FLAKY = (HERE / name for name in ("bank.jsonl", "file.txt", "marker", "flaky"))

engine = sa.create_engine(f"sqlite:///{HERE / 'shop.db'}", connect_args={"timeout": 10})
app = Celery("broken", broker="memory://", backend="cache+memory://")
app.conf.update(task_always_eager=True, task_acks_late=True, task_default_retry_delay=0)
QueueLog(app, store=SQLStore(engine))

PAY = sa.text("INSERT INTO payment VALUES (:order)")
ADD = sa.text("UPDATE account SET balance = balance + :amount WHERE id = :id")
READ, WRITE = (
    sa.text("SELECT balance FROM account WHERE id = 2"),
    sa.text("UPDATE account SET balance = :b WHERE id = 2"),
)


def reset() -> None:
    """Undo every effect."""
    with engine.begin() as connection:
        for table in ("payment", "account"):
            connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
        connection.execute(sa.text("CREATE TABLE payment (order_id TEXT)"))
        connection.execute(sa.text("CREATE TABLE account (id INTEGER, balance INTEGER)"))
        connection.execute(sa.text("INSERT INTO account VALUES (1, 100), (2, 0)"))
    for path in (BANK, FILE, MARKER, FLAKY):
        path.unlink(missing_ok=True)


def effects() -> dict[str, Any]:
    """Return what there is of each effect, if anything."""
    with engine.connect() as connection:
        payments = connection.scalar(sa.text("SELECT count(*) FROM payment"))
        balances = tuple(connection.execute(sa.text("SELECT balance FROM account ORDER BY id")).scalars())
    found = {
        "payments": payments,
        "balances": balances if balances != (100, 0) else None,
        "charges": len(_charges()),
        "file": FILE.read_text() if FILE.exists() else None,
    }
    return {name: value for name, value in found.items() if value}


def _charges() -> list[str]:
    return [json.loads(line) for line in BANK.read_text().splitlines()] if BANK.exists() else []


def bank(key: str | None = None) -> None:
    """Charge by a service of somebody else's, which knows its keys."""
    if key is None or key not in _charges():
        with BANK.open("a") as file:
            file.write(json.dumps(key or str(uuid4())) + "\n")


def flaky() -> None:
    """Fail the first time."""
    if not FLAKY.exists():
        FLAKY.touch()
        raise ConnectionError


def known_as() -> str:
    """Return the id of the message that runs."""
    message = current_message()
    assert message is not None
    return message.message_id


def task(**options: Any) -> Any:
    """Declare a task."""
    return app.task(base=IdempotentTask, bind=True, message_id="order:{order_id}", shared=False, **options)


@task()
def committed_by_itself(self: Any, order_id: str) -> None:
    with Session(engine) as session:
        session.execute(PAY, {"order": order_id})
        session.commit()


@task(atomic=True)
def committed_with_the_message(self: Any, order_id: str) -> None:
    self.session.execute(PAY, {"order": order_id})


@task(atomic=True)
def past_the_transaction(self: Any, order_id: str) -> None:
    with engine.begin() as connection:
        connection.execute(PAY, {"order": order_id})
    self.session.execute(ADD, {"id": 2, "amount": 10})


@task(atomic=True)
def in_the_transaction(self: Any, order_id: str) -> None:
    self.connection.execute(PAY, {"order": order_id})
    self.session.execute(ADD, {"id": 2, "amount": 10})


@task()
def two_commits(self: Any, order_id: str) -> None:
    with Session(engine) as session:
        session.execute(ADD, {"id": 1, "amount": -10})
        session.commit()
        session.execute(ADD, {"id": 2, "amount": 10})
        session.commit()


@task(atomic=True)
def one_commit(self: Any, order_id: str) -> None:
    self.session.execute(ADD, {"id": 1, "amount": -10})
    self.session.execute(ADD, {"id": 2, "amount": 10})


@task()
def without_a_key(self: Any, order_id: str) -> None:
    bank()


@task()
def with_a_key(self: Any, order_id: str) -> None:
    bank(order_id)


@task()
def with_a_random_key(self: Any, order_id: str) -> None:
    key = str(uuid4())
    bank(key)


@task()
def with_the_messages_key(self: Any, order_id: str) -> None:
    bank(known_as())


@task()
def a_step_without_a_key(self: Any, order_id: str) -> None:
    self.step("charge", bank)


@task()
def a_step_with_its_key(self: Any, order_id: str) -> None:
    self.step("charge", bank, self.step_key("charge"))


@app.task(base=IdempotentTask, shared=False)
def notify(order_id: str) -> None:
    bank(known_as())


@task()
def calls_under_a_random_id(self: Any, order_id: str) -> None:
    notify.apply_async((order_id,), message_id=str(uuid4()))


@task()
def calls_under_the_same_id(self: Any, order_id: str) -> None:
    notify.delay(order_id)


@task()
def reads_then_writes(self: Any, order_id: str) -> None:
    with engine.begin() as connection:
        balance = connection.scalar(READ)
    with engine.begin() as connection:
        connection.execute(WRITE, {"b": balance + 10})


@task(atomic=True)
def reads_and_writes(self: Any, order_id: str) -> None:
    balance = self.session.scalar(READ)
    self.session.execute(WRITE, {"b": balance + 10})


@task()
def appends(self: Any, order_id: str) -> None:
    with FILE.open("a") as file:
        file.write("a line\n")


@task()
def replaces(self: Any, order_id: str) -> None:
    whole = FILE.with_suffix(".new")
    whole.write_text("a line\n")
    whole.rename(FILE)


@task(autoretry_for=(ConnectionError,))
def charges_before_it_fails(self: Any, order_id: str) -> None:
    bank()
    flaky()


@task(autoretry_for=(ConnectionError,))
def fails_before_it_charges(self: Any, order_id: str) -> None:
    flaky()
    bank(order_id)


@task()
def marks_first(self: Any, order_id: str) -> None:
    if not MARKER.exists():
        MARKER.touch()
        bank(order_id)


@task()
def marks_last(self: Any, order_id: str) -> None:
    if not MARKER.exists():
        bank(order_id)
        MARKER.touch()


@task(acks_late=False)
def acknowledged_early(self: Any, order_id: str) -> None:
    bank(order_id)


@task(acks_late=True)
def acknowledged_late(self: Any, order_id: str) -> None:
    bank(order_id)


#: Each broken task with its mended twin.
PAIRS = [
    (committed_by_itself, committed_with_the_message),
    (past_the_transaction, in_the_transaction),
    (two_commits, one_commit),
    (without_a_key, with_a_key),
    (with_a_random_key, with_the_messages_key),
    (a_step_without_a_key, a_step_with_its_key),
    (calls_under_a_random_id, calls_under_the_same_id),
    (reads_then_writes, reads_and_writes),
    (appends, replaces),
    (charges_before_it_fails, fails_before_it_charges),
    (marks_first, marks_last),
    (acknowledged_early, acknowledged_late),
]
