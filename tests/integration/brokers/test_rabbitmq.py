"""RabbitMQ cuts a connection, goes away, or gives a message up: each message runs once more if it must, and none is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from kombu.connection import Connection

from celery_idempotent import AlreadyFailedError
from celery_idempotent.core.decision import MAX_TAKEOVERS
from tests.conftest import StartWorker, missing
from tests.integration.brokers.conftest import PATIENCE, MakeSite, wait_until_logged
from tests.support.brokers import Broker, rabbitmq_broker
from tests.support.proxy import Proxy
from tests.support.servers import NotInstalledError, PrivateRabbitMQ
from tests.support.stand import capture, put
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group("private-rabbitmq")

KINDS = ("classic", "quorum")

#: Or RabbitMQ forgets what it was handed the moment before it goes away.
CONFIRMED = {"confirm_publish": True}


@pytest.fixture(scope="module")
def server() -> Iterator[PrivateRabbitMQ]:
    """One for this module: it takes more time to start than most of these tests."""
    try:
        server = PrivateRabbitMQ().__enter__()
    except NotInstalledError as error:
        missing("a private server", str(error))
    yield server
    server.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_is_cut_under_a_running_task(
    make_site: MakeSite, start_worker: StartWorker, server: PrivateRabbitMQ, kind: str
) -> None:
    """RabbitMQ delivers again at once; the worker that still runs it is handed the copy."""
    with rabbitmq_broker(server.url, queue_type=kind) as broker, Proxy(server.url) as proxy:
        site = make_site(broker)
        worker = start_worker(replace(site.spec, broker=proxy.url), concurrency=2)
        gate = site.gate()
        result = site.send("gated", str(gate), "once")
        site.wait_for_starts(result)

        proxy.close_for_now()
        wait_until_logged([worker], "Trying again in")
        proxy.reopen()
        wait_until_logged([worker], f"gated[{result.id}] is held for", 2)
        assert len(site.starts(result)) == 1
        gate.touch()

        site.assert_ran_once("gated", {result: "once"})
        site.settled(result, "gated", duplicates=1)
        site.assert_ran_once("echo", {site.send("echo", "after it"): "after it"})
        assert len(site.starts(result)) == 1
        # Warmly: what was counted as skipped may not be acknowledged yet.
        worker.terminate()
        assert waiting(broker, 0) == 0


def test_a_restart_under_running_tasks_while_others_wait(
    make_site: MakeSite, start_worker: StartWorker, server: PrivateRabbitMQ
) -> None:
    """On queues of both kinds."""
    with ExitStack() as stack:
        brokers = [stack.enter_context(rabbitmq_broker(server.url, queue_type=kind)) for kind in KINDS]
        # Workers come back when it is all there: a consumer of a quorum queue without a leader yet may wait for ever.
        proxy = stack.enter_context(Proxy(server.url))
        sites = [make_site(broker, transport_options=CONFIRMED) for broker in brokers]
        workers = [start_worker(replace(site.spec, broker=proxy.url), wait=False) for site in sites]
        for worker in workers:
            worker.wait_until_ready()
        gate = sites[0].gate()
        running = [site.send("gated", str(gate), "running") for site in sites]
        for site, result in zip(sites, running, strict=True):
            site.wait_for_starts(result)
        values = [{site.send("echo", number): number for number in range(4)} for site in sites]

        wait_until_on_disk(server, brokers[KINDS.index("quorum")])
        server.kill()
        proxy.close_for_now()
        for worker in workers:
            wait_until_logged([worker], "Trying again in")
        server.start()
        assert [waiting(broker, 5) for broker in brokers] == [5, 5]
        proxy.reopen()
        for site, worker, result in zip(sites, workers, running, strict=True):
            # Delivered again: its one child is busy, so it waits there.
            wait_until_logged([worker], f"Task gated[{result.id}] received", 2)
            assert len(site.starts(result)) == 1
        gate.touch()

        for site, worker, result, echoed in zip(sites, workers, running, values, strict=True):
            site.assert_ran_once("gated", {result: "running"})
            site.assert_ran_once("echo", {**echoed, site.send("echo", "after it"): "after it"})
            site.settled(result, "gated", duplicates=1)
            # Warmly: what was counted as skipped may not be acknowledged yet.
            worker.terminate()
        assert len(sites[0].ledger.starts()) == 2 * (1 + 4 + 1)
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

    def test_two_workers_die_of_it_and_the_third_is_given_it_from_its_row(
        self, make_site: MakeSite, start_worker: StartWorker, broker: Broker
    ) -> None:
        dead = f"{broker.queue}-dead"
        site = make_site(broker, transport_options=CONFIRMED, idempotent_lease=2)
        without_recovery = replace(site.spec, settings={**site.spec.settings, "idempotent_recovery_interval": 0})
        gate = site.gate()

        workers = [start_worker(without_recovery)]
        result = site.send("gated", str(gate), "at last")
        for death in (1, 2):
            site.wait_for_starts(result, death)
            workers.pop().kill()
            wait_until(lambda: site.row(result, "gated").lease_left <= 0, timeout=PATIENCE, describe="the lease's end")
            assert waiting(broker, 2 - death) == 2 - death
            if death == 1:
                workers.append(start_worker(without_recovery))
        worker = start_worker(site.spec)
        site.wait_for_starts(result, 3)
        gate.touch()

        assert result.get(timeout=PATIENCE) == "at last"
        row = site.settled(result, "gated")
        assert (row.processed_status, row.token, row.takeovers) == ("success", 3, 2)
        assert len(site.starts(result)) == 3
        # What the broker gave up is a copy like any other, for whoever moves it back.
        (given_up,) = capture(site.app, dead)
        put(site.app, broker.queue, [given_up])
        site.settled(result, "gated", duplicates=1)
        assert len(site.starts(result)) == 3
        worker.stop()

    def test_a_message_that_kills_whoever_runs_it_is_given_up_as_often_as_elsewhere(
        self, make_site: MakeSite, start_worker: StartWorker, broker: Broker
    ) -> None:
        site = make_site(broker)
        start_worker(site.spec)

        result = site.send("poison")

        error = result.get(timeout=100, propagate=False)
        assert isinstance(error, AlreadyFailedError)
        row = site.settled(result, "poison")
        assert (row.processed_status, row.takeovers) == ("failure", MAX_TAKEOVERS)
        assert str(row.error).startswith("abandoned")
        assert len(site.starts(result)) == MAX_TAKEOVERS + 1


def wait_until_on_disk(server: PrivateRabbitMQ, broker: Broker) -> None:
    """Wait until a quorum queue that was declared just now would be found again after a kill.

    RabbitMQ confirms its messages before it has written down which of its folders they are in, half a second or more later. One that is
    killed before that starts the queue anew, empty and without a leader (``name_not_registered``, rabbitmq-server issue 15725).
    """
    (names,) = server.directory.glob("mnesia/*/quorum/*/names.dets")
    wait_until(
        lambda: broker.queue.encode() in names.read_bytes(), timeout=PATIENCE, describe=f"{broker.queue} in {names}"
    )


def waiting(broker: Broker, expected: int) -> int:
    """How many messages wait on its queue, once nobody consumes from it and there are as many as expected."""
    with Connection(broker.url) as connection:

        def ask() -> tuple[int, int]:
            answer = connection.default_channel.queue_declare(broker.queue, passive=True)
            return answer.message_count, answer.consumer_count

        wait_until(lambda: ask() == (expected, 0), timeout=PATIENCE, describe=lambda: f"({expected}, 0), not {ask()}")
    return expected
