"""RabbitMQ cuts a connection, goes away, or gives a message up: each message runs once more if it must, and none is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from kombu.connection import Connection

from celery_idempotent import AlreadyFailedError
from celery_idempotent.core.decision import MAX_TAKEOVERS
from tests.conftest import StartWorker
from tests.integration.brokers.conftest import Deploy, wait_until_logged
from tests.support.brokers import Broker, rabbitmq_broker
from tests.support.captured import capture, put
from tests.support.proxy import Proxy
from tests.support.servers import PrivateRabbitMQ, skip_if_not_installed
from tests.support.versions import CELERY
from tests.support.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.xdist_group("private-rabbitmq")

KINDS = ("classic", "quorum")

#: Or RabbitMQ forgets what it was handed the moment before it goes away.
CONFIRMED = {"confirm_publish": True}


@pytest.fixture(scope="module")
def server() -> Iterator[PrivateRabbitMQ]:
    """One for this module: it takes more time to start than most of these tests."""
    with skip_if_not_installed(), PrivateRabbitMQ() as server:
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_is_cut_under_a_running_task(
    deploy: Deploy, start_worker: StartWorker, server: PrivateRabbitMQ, kind: str
) -> None:
    """RabbitMQ delivers again at once; the worker that still runs it is handed the copy."""
    with rabbitmq_broker(server.url, queue_type=kind) as broker, Proxy(server.url) as proxy:
        deployment = deploy(broker)
        worker = start_worker(replace(deployment.spec, broker=proxy.url), concurrency=2)
        gate = deployment.gate()
        result = deployment.send("gated", str(gate), "once")
        deployment.wait_for_starts("gated", result)

        proxy.close_for_now()
        wait_until_logged([worker], "Trying again in")
        proxy.reopen()
        wait_until_logged([worker], f"Task gated[{result.id}] received", 2)
        # Up to Celery 5.6 the pool may forget who is busy: then the copy waits for the very child that runs the body.
        if CELERY >= (5, 7):
            wait_until_logged([worker], f"gated[{result.id}] is held for", 2)
        assert len(deployment.starts("gated", result)) == 1
        gate.touch()

        deployment.assert_ran_once("gated", {result: "once"})
        deployment.wait_until_done("gated", result, duplicates=1)
        deployment.assert_ran_once("echo", {deployment.send("echo", "after it"): "after it"})
        assert len(deployment.starts("gated", result)) == 1
        # Warmly: what was counted as skipped may not be acknowledged yet.
        worker.terminate()
        assert waiting(broker, 0) == 0


def test_a_restart_under_running_tasks_while_others_wait(
    deploy: Deploy, start_worker: StartWorker, server: PrivateRabbitMQ
) -> None:
    """On queues of both kinds."""
    with ExitStack() as stack:
        brokers = [stack.enter_context(rabbitmq_broker(server.url, queue_type=kind)) for kind in KINDS]
        # Workers come back when it is all there: a consumer of a quorum queue without a leader yet may wait for ever.
        proxy = stack.enter_context(Proxy(server.url))
        deployments = [deploy(broker, transport_options=CONFIRMED) for broker in brokers]
        workers = [start_worker(replace(deployment.spec, broker=proxy.url), wait=False) for deployment in deployments]
        for worker in workers:
            worker.wait_until_ready()
        gate = deployments[0].gate()
        running = [deployment.send("gated", str(gate), "running") for deployment in deployments]
        for deployment, result in zip(deployments, running, strict=True):
            deployment.wait_for_starts("gated", result)
        values = [{deployment.send("echo", number): number for number in range(4)} for deployment in deployments]

        wait_until_on_disk(server, brokers[KINDS.index("quorum")])
        server.kill()
        proxy.close_for_now()
        for worker in workers:
            wait_until_logged([worker], "Trying again in")
        server.start()
        assert [waiting(broker, 5) for broker in brokers] == [5, 5]
        proxy.reopen()
        for deployment, worker, result in zip(deployments, workers, running, strict=True):
            # Delivered again: its one child is busy, so it waits there.
            wait_until_logged([worker], f"Task gated[{result.id}] received", 2)
            assert len(deployment.starts("gated", result)) == 1
        gate.touch()

        for deployment, worker, result, echoed in zip(deployments, workers, running, values, strict=True):
            deployment.assert_ran_once("gated", {result: "running"})
            deployment.assert_ran_once("echo", {**echoed, deployment.send("echo", "after it"): "after it"})
            deployment.wait_until_done("gated", result, duplicates=1)
            # Warmly: what was counted as skipped may not be acknowledged yet.
            worker.terminate()
        assert len(deployments[0].ledger.starts()) == 2 * (1 + 4 + 1)
        assert [waiting(broker, 0) for broker in brokers] == [0, 0]


class TestADeliveryLimitOfOne:
    """A quorum queue gives a message up that came back twice: it is dropped, or put on another queue."""

    @pytest.fixture
    def broker(self, server: PrivateRabbitMQ) -> Iterator[Broker]:
        with rabbitmq_broker(server.url, queue_type="quorum") as broker:
            dead = broker.other_queue("dead")
            with Connection(server.url) as connection:
                connection.default_channel.queue_declare(dead, durable=True, auto_delete=False)
            arguments = {
                "x-queue-type": "quorum",
                "x-delivery-limit": 1,
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": dead,
            }
            queue = {
                "exchange": broker.queue,
                "exchange_type": "topic",
                "routing_key": broker.queue,
                "queue_arguments": arguments,
            }
            yield replace(broker, settings={**broker.settings, "task_queues": {broker.queue: queue}})

    def test_a_third_worker_gets_the_message_from_its_row(
        self, deploy: Deploy, start_worker: StartWorker, broker: Broker
    ) -> None:
        dead = f"{broker.queue}-dead"
        deployment = deploy(broker, transport_options=CONFIRMED, idempotent_lease=2)
        without_recovery = replace(
            deployment.spec, settings={**deployment.spec.settings, "idempotent_recovery_interval": 0}
        )
        gate = deployment.gate()

        workers = [start_worker(without_recovery)]
        result = deployment.send("gated", str(gate), "at last")
        for death in (1, 2):
            deployment.wait_for_starts("gated", result, death)
            workers.pop().kill()
            wait_until(lambda: deployment.row("gated", result).lease_left <= 0, describe="the lease's end")
            assert waiting(broker, 2 - death) == 2 - death
            if death == 1:
                workers.append(start_worker(without_recovery))
        worker = start_worker(deployment.spec)
        deployment.wait_for_starts("gated", result, 3)
        gate.touch()

        assert result.get(timeout=TIMEOUT) == "at last"
        row = deployment.wait_until_done("gated", result)
        assert (row.processed_status, row.token, row.takeovers) == ("success", 3, 2)
        assert len(deployment.starts("gated", result)) == 3
        # A message moved back from the dead-letter queue is a copy like any other.
        (given_up,) = capture(deployment.app, dead)
        put(deployment.app, broker.queue, [given_up])
        deployment.wait_until_done("gated", result, duplicates=1)
        assert len(deployment.starts("gated", result)) == 3
        worker.stop()

    def test_a_message_that_kills_its_workers_is_given_up_alike(
        self, deploy: Deploy, start_worker: StartWorker, broker: Broker
    ) -> None:
        deployment = deploy(broker)
        start_worker(deployment.spec)

        result = deployment.send("poison")

        error = result.get(timeout=100, propagate=False)
        assert isinstance(error, AlreadyFailedError)
        row = deployment.wait_until_done("poison", result)
        assert (row.processed_status, row.takeovers) == ("failure", MAX_TAKEOVERS)
        assert str(row.error).startswith("abandoned")
        assert len(deployment.starts("poison", result)) == MAX_TAKEOVERS + 1


def wait_until_on_disk(server: PrivateRabbitMQ, broker: Broker) -> None:
    """Wait until a quorum queue that was declared just now would be found again after a kill.

    RabbitMQ confirms its messages before it has written down which of its folders they are in, half a second or more later. One that is
    killed before that starts the queue anew, empty and without a leader (``name_not_registered``, rabbitmq-server issue 15725).
    """
    (names,) = server.directory.glob("mnesia/*/quorum/*/names.dets")
    wait_until(lambda: broker.queue.encode() in names.read_bytes(), describe=f"{broker.queue} in {names}")


def waiting(broker: Broker, expected: int) -> int:
    """Return how many messages wait on its queue, once it has no consumer and as many as expected."""
    with Connection(broker.url) as connection:

        def ask() -> tuple[int, int]:
            answer = connection.default_channel.queue_declare(broker.queue, passive=True)
            return answer.message_count, answer.consumer_count

        wait_until(lambda: ask() == (expected, 0), describe=lambda: f"({expected}, 0), not {ask()}")
    return expected
