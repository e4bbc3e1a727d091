"""Recovery with a backlog: a hundred thousand messages wait, none is lost, and a pass costs no more for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from statistics import median
from uuid import uuid4

import pytest
import sqlalchemy as sa
from celery import Celery

from celery_idempotent import IdempotentTask, QueueLog
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage
from celery_idempotent.maintenance.recovery import Recovered, Recovery
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.serialization import encode_message
from celery_idempotent.stores.sql import SQLStore

BACKLOG = 100_000

#: Rounds of each kind, taken in turns, and what is timed in one.
ROUNDS, CLAIMS, STEPS = 6, 12, 4

#: What every one of the backlog is like.
PATTERN = MessageKey("pattern", "work")

#: Every one of the backlog was published an hour ago, and is due.
FILL = """
INSERT INTO queue_log (message_id, task_name, status, created_timestamp, task_id, queue, attempt, token, published_at, duplicates,
    takeovers, message)
SELECT concat('backlog:', n), 'work', 'pending', {hour_ago}, concat('id:', n), 'slow', 0, 0, {hour_ago}, 0, 0, message
FROM (SELECT {series}) AS numbers CROSS JOIN (SELECT message FROM queue_log WHERE message_id = 'pattern') AS pattern
"""

PARTS = {
    "postgresql": {
        "series": f"generate_series(1, {BACKLOG}) AS n",
        "hour_ago": "statement_timestamp() - INTERVAL '1 hour'",
    },
    "mysql": {"series": f"seq AS n FROM seq_1_to_{BACKLOG}", "hour_ago": "DATE_SUB(UTC_TIMESTAMP(6), INTERVAL 1 HOUR)"},
}


#: The message of the backlog that its worker has begun, which has overtaken nothing; and one that runs on another queue.
BEGUN, RUNNING = MessageKey("backlog:1", "work"), MessageKey("running", "work")


@contextmanager
def on(store: SQLStore) -> Iterator[Celery]:
    """Yield an app on a store, whose broker is in this process, and which has seen deliveries of both queues."""
    app = Celery("beside", broker=f"memory://{uuid4().hex}", set_as_current=False)
    QueueLog(app, store=store)

    @app.task(name="work", base=IdempotentTask, shared=False)
    def work(number: int) -> int:
        return number

    app.finalize()
    claimed(store, RUNNING)
    Rescue.of(app.queue_log).saw("fast", RUNNING)
    Rescue.of(app.queue_log).saw("slow", BEGUN)
    yield app
    app.close()


def message(key: MessageKey, queue: str) -> NewMessage:
    encoded = encode_message((1,), {}, {"queue": queue}, serializer="json")
    return NewMessage(key, f"id of {key.message_id}", queue=queue, message=encoded)


def claim(store: SQLStore, new: NewMessage) -> None:
    assert isinstance(store.claim(new, worker="w:1", lease=600.0, grace=0.0), Claimed)


def claimed(store: SQLStore, key: MessageKey) -> None:
    new = message(key, "slow" if key == BEGUN else "fast")
    store.record(new)
    claim(store, new)


@pytest.fixture
def backlog(store: SQLStore) -> SQLStore:
    """Return a log on which the backlog waits."""
    store.record(message(PATTERN, "slow"))
    dialect = store.engine.dialect.name
    with store.engine.begin() as connection:
        connection.execute(sa.text(FILL.format(**PARTS[dialect])))
        connection.execute(sa.text(f"DELETE FROM queue_log WHERE message_id = '{PATTERN.message_id}'"))
        connection.execute(sa.text("ANALYZE queue_log" if dialect == "postgresql" else "ANALYZE TABLE queue_log"))
    claim(store, message(BEGUN, "slow"))
    return store


def seconds(ask: Callable[[], object]) -> float:
    began = time.perf_counter()
    ask()
    return time.perf_counter() - began


@contextmanager
def stepping(step: Callable[[], Recovered], answers: list[object]) -> Iterator[None]:
    """Step after step in a thread, one at least."""
    over = threading.Event()

    def go_on() -> None:
        try:
            answers.append(step())
            while not over.wait(0.005):  # or the two threads would only take turns
                answers.append(step())
        except Exception as error:  # noqa: BLE001 - the test has to see any error
            answers.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def steps_of(app: Celery, answers: list[object]) -> list[float]:
    """Return the times of some steps."""
    step = Recovery(app.queue_log).run_pass
    return [seconds(lambda: answers.append(step())) for _ in range(STEPS)]


def claims_on(store: SQLStore) -> list[float]:
    """Return the times of some claims."""
    messages = [message(MessageKey(uuid4().hex, "work"), "fast") for _ in range(CLAIMS)]
    for new in messages:
        store.record(new)
    return [seconds(partial(claim, store, new)) for new in messages]


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
def test_recovery_beside_a_backlog(backlog: SQLStore, store_url: str) -> None:
    """It publishes none of it, a step takes no longer than without it, and claims take no longer than without recovery."""
    answers: list[object] = []
    beside, alone, disturbed, undisturbed = (list[float]() for _ in range(4))

    with closing(SQLStore(store_url, table="short")) as short:
        short.init()
        claimed(short, BEGUN)
        with on(backlog) as busy, on(short) as idle:
            for _ in range(ROUNDS):
                beside += steps_of(busy, answers)
                alone += steps_of(idle, answers)
                undisturbed += claims_on(backlog)
                with stepping(Recovery(busy.queue_log).run_pass, answers):
                    disturbed += claims_on(backlog)

    assert set(answers) == {Recovered()}
    # To read the backlog takes PostgreSQL more than ten times as long as all of a step, and MariaDB some hundred times.
    assert median(beside) < 5 * median(alone), (beside, alone)
    assert median(disturbed) < 3 * median(undisturbed), (disturbed, undisturbed)
