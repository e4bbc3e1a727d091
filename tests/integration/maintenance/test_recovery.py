"""Recovery: workers die and brokers forget, and the row brings the message back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.result import AsyncResult
from kombu.exceptions import OperationalError

from celery_idempotent import AlreadyFailedError, IdempotentTask, QueueLog
from celery_idempotent.core.decision import MAX_TAKEOVERS
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, ProcessedStatus, Status
from celery_idempotent.maintenance.recovery import Recovered, Recovery
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.serialization import encode_message
from celery_idempotent.stores.sql import SQLStore
from tests.support.apps import AppSpec, OpenApp
from tests.support.deployment import Deployment
from tests.support.servers import PrivateRedis
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import StartWorker

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE

LEASE = 2.0
TASKS = ("tests.support.apps.generic", "tests.support.apps.lasting", "tests.support.apps.outcomes")

on_redis = pytest.mark.parametrize("broker", ["redis"], indirect=True)
on_files = pytest.mark.parametrize("broker", ["filesystem"], indirect=True)
on_sqlite = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@dataclass
class FileDeployment(Deployment):
    """An app whose workers recover every second, and whose messages can be looked at on the filesystem broker."""

    def files(self) -> dict[str, Path]:
        """Return the messages that wait on the filesystem broker, by task id."""
        found = {}
        for path in Path(self.spec.transport_options["data_folder_out"]).glob(f"*{self.spec.queue}.msg"):
            try:
                found[json.loads(path.read_text())["headers"]["id"]] = path
            except FileNotFoundError:
                continue  # a worker has just taken it
        return found


@pytest.fixture
def deploy(spec: AppSpec, open_app: OpenApp) -> Callable[..., FileDeployment]:
    def deploy(**settings: Any) -> FileDeployment:
        given = {**spec.settings, "idempotent_lease": LEASE, "idempotent_recovery_interval": 1.0, **settings}
        deployed_spec = replace(spec, tasks=TASKS, settings=given)
        app = open_app(deployed_spec)
        app.finalize()
        return FileDeployment(deployed_spec, app)

    return deploy


@on_files
@on_sqlite
class TestABrokerThatKeepsNoCopy:
    def test_a_message_comes_back_from_its_row(
        self, deploy: Callable[..., FileDeployment], start_worker: StartWorker
    ) -> None:
        deployment = deploy()
        worker = start_worker(deployment.spec)
        gate = deployment.gate()

        result = deployment.send("last.late", str(gate), "back")
        deployment.wait_for_starts("last.late", result)
        worker.kill()
        assert deployment.files() == {}
        worker.start()
        starts = deployment.wait_for_starts("last.late", result, 2)
        gate.touch()

        assert result.get(timeout=TIMEOUT) == "back"
        assert [start.retries for start in starts] == [0, 0]
        row = deployment.wait_for_row("last.late", result, lambda row: row.status is Status.DONE)
        assert (row.processed_status, row.token, row.takeovers) == (SUCCESS, 2, 1)
        assert len(deployment.ledger.starts("last.late", task_id=result.id)) == 2

    def test_an_early_acknowledged_message_fails_and_its_caller_gets_the_error(
        self, deploy: Callable[..., FileDeployment], start_worker: StartWorker
    ) -> None:
        """It may have had its effect, and only ``on_abandoned="rerun"`` says that it may have it again."""
        deployment = deploy()
        worker = start_worker(deployment.spec)

        errback = deployment.app.tasks["errback"].s()
        result = deployment.send("last.early", str(deployment.gate()), link_error=errback)
        deployment.wait_for_starts("last.early", result)
        worker.kill()
        worker.start()

        error = result.get(timeout=TIMEOUT, propagate=False)
        assert isinstance(error, AlreadyFailedError)
        assert error.message_id == result.id
        assert str(error.error).startswith("abandoned")
        row = deployment.row("last.early", result)
        assert (row.status, row.processed_status, row.token) == (Status.DONE, FAILURE, 1)
        assert str(row.error).startswith("abandoned")

        def told() -> bool:
            return any(note.detail == result.id for note in deployment.ledger.ends("errback"))

        wait_until(told, describe="the errback")
        assert len(deployment.ledger.starts("last.early", task_id=result.id)) == 1

    def test_a_message_that_was_lost_is_found_when_it_is_overtaken(
        self, deploy: Callable[..., FileDeployment], start_worker: StartWorker
    ) -> None:
        """A backlog on a queue without a consumer is left alone until an operator asks."""
        deployment = deploy(idempotent_lost_after=1.0)
        paused = f"{deployment.spec.queue}-paused"
        waiting = [deployment.send("echo", number, queue=paused) for number in range(3)]
        lost = deployment.send("echo", "lost")
        kept = deployment.send("echo", "kept")
        deployment.files()[lost.id].unlink()
        wait_until(lambda: deployment.row("echo", kept).read_at.timestamp() - created(deployment, kept) > 1.5)
        worker = start_worker(deployment.spec)
        assert kept.get(timeout=TIMEOUT) == "kept"

        # Recorded more than a second after it, and claimed.
        later = deployment.send("echo", "later")
        assert later.get(timeout=TIMEOUT) == "later"
        assert lost.get(timeout=TIMEOUT) == "lost"

        assert [starts(deployment, result) for result in (lost, kept, later)] == [1, 1, 1]
        rows = [deployment.row("echo", result) for result in waiting]
        assert all(row.published_at == row.created_timestamp for row in rows)
        assert all(row.read_at.timestamp() - row.created_timestamp.timestamp() > 1.0 for row in rows)
        worker.wait_for_log("is published again: it was pending")

        # All copies are there, and an operator publishes more of them; the claims absorb the excess.
        assert Rescue.of(deployment.app.queue_log).publish_waiting(1.0) == 3
        deployment.app.control.add_consumer(paused, destination=[worker.hostname])
        assert [result.get(timeout=TIMEOUT) for result in waiting] == [0, 1, 2]
        for result in waiting:
            deployment.wait_for_row("echo", result, lambda row: row.duplicates == 1)
        assert [starts(deployment, result) for result in waiting] == [1, 1, 1]


def created(deployment: Deployment, result: AsyncResult[Any]) -> float:
    return deployment.row("echo", result).created_timestamp.timestamp()


def starts(deployment: Deployment, result: AsyncResult[Any]) -> int:
    return len(deployment.ledger.starts("echo", task_id=result.id))


@on_redis
@on_sqlite
def test_a_retry_that_the_broker_does_not_take_goes_on_later(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker
) -> None:
    """Celery itself gives the message up: it turns what the publication raised into a rejection."""
    with PrivateRedis() as broker:
        settings = {"task_publish_retry": False, "idempotent_lease": LEASE, "idempotent_recovery_interval": 1.0}
        spec = replace(spec, broker=broker.url, tasks=TASKS, settings=settings)
        deployment = FileDeployment(spec, open_app(spec))
        start_worker(spec)

        gate = deployment.gate()
        result = deployment.send("last.retry", str(gate))
        deployment.wait_for_starts("last.retry", result)
        broker.kill()
        gate.touch()
        row = deployment.wait_for_row("last.retry", result, lambda row: row.attempt == 1 and row.published_at is None)
        assert row.status is Status.PENDING
        broker.start()
        # kombu 5.7 does not survive a Redis that is gone while a message is unacknowledged: its worker ends, and is replaced.
        start_worker(spec)

        assert result.get(timeout=TIMEOUT) == 1
        assert [start.retries for start in deployment.ledger.starts("last.retry", task_id=result.id)] == [0, 1]


@on_redis
@on_sqlite
class TestOneWorkerThatDies:
    @pytest.mark.timeout(240)
    def test_a_message_that_kills_its_workers_is_given_up(
        self, deploy: Callable[..., FileDeployment], start_worker: StartWorker
    ) -> None:
        deployment = deploy()
        start_worker(deployment.spec)

        result = deployment.send("poison")

        # Six children die, and Celery may take seconds to notice each.
        error = result.get(timeout=3 * TIMEOUT, propagate=False)
        assert isinstance(error, AlreadyFailedError)
        row = deployment.row("poison", result)
        assert (row.status, row.processed_status, row.takeovers) == (Status.DONE, FAILURE, MAX_TAKEOVERS)
        assert str(row.error).startswith("abandoned")
        assert len(deployment.ledger.starts("poison", task_id=result.id)) == MAX_TAKEOVERS + 1
        # It is over for the worker too.
        assert deployment.send("echo", "alive").get(timeout=TIMEOUT) == "alive"

    def test_an_unacknowledged_message_that_celery_gave_up_runs_again(
        self, deploy: Callable[..., FileDeployment], start_worker: StartWorker
    ) -> None:
        """``acks_late`` alone: Celery acknowledges the message of a child that was killed. Its lease is an hour."""
        deployment = deploy()
        start_worker(deployment.spec)

        result = deployment.send("die.late", str(deployment.gate()))

        deployment.wait_for_starts("die.late", result, 2)
        row = deployment.wait_for_row("die.late", result, lambda row: row.status is Status.DONE)
        assert (row.processed_status, row.token) == (SUCCESS, 2)
        wait_until(
            lambda: deployment.app.AsyncResult(result.id).successful(),
            describe="the second run's result",
        )
        assert len(deployment.ledger.starts("die.late", task_id=result.id)) == 2


@on_redis
@on_sqlite
def test_a_message_the_broker_refused_is_left_to_the_next_pass(
    deploy: Callable[..., FileDeployment], private_redis: PrivateRedis
) -> None:
    deployment = deploy()
    store = deployment.app.queue_log.store
    lapsed, unsent = (uuid4().hex for _ in range(2))
    for name, published in ((lapsed, True), (unsent, False)):
        message = encode_message(("x",), {}, {}, serializer="json")
        store.record(NewMessage(MessageKey(name, "echo"), name, message=message, published=published))
    claimed = store.claim(NewMessage(MessageKey(lapsed, "echo"), lapsed), worker="w:1", lease=60.0, grace=0.0)
    assert isinstance(claimed, Claimed)
    store.expire(claimed.claim)

    private_redis.stop()
    for _ in range(2):
        with pytest.raises(OperationalError):
            Recovery(deployment.app.queue_log).run_pass()
        assert store.find(MessageKey(unsent, "echo")).published_at is None
        assert store.find(MessageKey(lapsed, "echo")).published_at is None
    private_redis.start()

    assert Recovery(deployment.app.queue_log).run_pass() == Recovered(taken_back=1, relayed=1)
    assert Recovery(deployment.app.queue_log).run_pass() == Recovered()
    with (
        deployment.app.connection_for_read() as connection,
        closing(connection.SimpleQueue(deployment.spec.queue)) as queue,
    ):
        assert {queue.get(timeout=TIMEOUT).properties["message_id"] for _ in range(2)} == {lapsed, unsent}
        with pytest.raises(queue.Empty):
            queue.get_nowait()
        # Whoever recovers a message does not wait for its result.
        assert connection.default_channel.client.pubsub_channels("celery-task-meta-*") == []


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
class TestManySteps:
    """Fifty workers' worth of passes on one database."""

    STEPS = 50
    ROWS = 200

    @pytest.fixture
    def app(self, store_url: str) -> Iterator[Celery]:
        app = Celery("many", broker=f"memory://{uuid4().hex}", set_as_current=False)
        store = SQLStore(store_url)
        QueueLog(app, store=store)
        app.conf.update(task_default_queue=f"many-{uuid4().hex}", idempotent_retention=3600.0)

        @app.task(name="work", base=IdempotentTask, shared=False)
        def work(number: int) -> int:
            return number

        app.finalize()
        store.init()
        yield app
        store.close()
        app.close()

    def fill(self, store: SQLStore) -> list[str]:
        """Rows whose leases ran out, rows never published, and rows past retention."""
        message = encode_message((1,), {}, {}, serializer="json")
        names = [f"{kind}:{number}" for kind in ("lapsed", "unsent", "old") for number in range(self.ROWS)]
        for name in names:
            new = NewMessage(MessageKey(name, "work"), name, message=message, published=not name.startswith("unsent"))
            store.record(new)
        table = store._table
        past: sa.ColumnElement[Any] = sa.literal_column("TIMESTAMP '2020-01-01 00:00:00'")
        with store.engine.begin() as connection:
            update = sa.update(table)
            connection.execute(
                update.where(table.c.message_id.like("lapsed:%")).values(
                    status="processing", token=1, worker="w:1", lease_expires_at=past, published_at=past
                )
            )
            connection.execute(
                update.where(table.c.message_id.like("old:%")).values(
                    status="done", processed_status="success", processed_timestamp=past
                )
            )
        return [name for name in names if not name.startswith("old")]

    def test_cost_three_statements_at_rest_and_two_more_however_many_queues(self, app: Celery) -> None:
        statements: list[str] = []

        def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            statements.append(statement)

        recovery, store = Recovery(app.queue_log), app.queue_log.store
        recovery.run_pass()
        sa.event.listen(sa.Engine, "before_cursor_execute", note)
        try:
            assert recovery.run_pass() == Recovered()
            assert len(statements) == 3
            for queue in ("one", "two"):
                message = NewMessage(MessageKey(queue, "work"), queue, queue=queue)
                store.record(message)
                store.claim(message, worker="w:1", lease=60.0, grace=30.0)
                Rescue.of(app.queue_log).saw(queue, message.key)
            statements.clear()
            assert recovery.run_pass() == Recovered()
            assert len(statements) == 3 + 2
        finally:
            sa.event.remove(sa.Engine, "before_cursor_execute", note)

    def test_concurrent_passes_do_not_interfere(self, app: Celery) -> None:
        store = app.queue_log.store
        names = self.fill(store)
        purged = 0

        for _ in range(2):  # nothing is left for the second time
            with ThreadPoolExecutor(self.STEPS) as threads:
                done = list(threads.map(lambda _: Recovery(app.queue_log).run_pass(), range(self.STEPS)))
            purged += sum(each.purged for each in done)

        with app.connection_for_read() as connection:
            queue = app.amqp.queues[app.conf.task_default_queue](connection.default_channel)
            queue.declare()
            published = [message.properties["message_id"] for message in iter(lambda: queue.get(no_ack=True), None)]
        assert sorted(published) == sorted(names)
        assert purged == self.ROWS
