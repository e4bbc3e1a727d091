"""RabbitMQ's ``consumer_timeout``: a task runs for longer, so its channel is closed and its message delivered again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.conftest import StartWorker
from tests.integration.brokers.conftest import Deploy, wait_until_logged
from tests.support.brokers import rabbitmq_broker
from tests.support.servers import PrivateRabbitMQ, skip_if_not_installed
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group("rabbitmq-consumer-timeout")

#: Seconds.
CONSUMER_TIMEOUT = 6.0


@pytest.fixture(scope="module")
def server() -> Iterator[PrivateRabbitMQ]:
    with skip_if_not_installed(), PrivateRabbitMQ(consumer_timeout=CONSUMER_TIMEOUT) as server:
        yield server


def test_a_task_that_runs_for_longer_than_the_consumer_timeout(
    deploy: Deploy, start_worker: StartWorker, server: PrivateRabbitMQ
) -> None:
    """Its worker stops, as Celery's do, once the task has ended; meanwhile another worker has the message."""
    with ExitStack() as stack:
        brokers = [stack.enter_context(rabbitmq_broker(server.url, queue_type=kind)) for kind in ("classic", "quorum")]
        # A held copy waits for no longer than the lease, in the worker: not long enough to be timed out itself.
        deployments = [deploy(broker, idempotent_lease=CONSUMER_TIMEOUT / 3) for broker in brokers]
        owners = [start_worker(deployment.spec) for deployment in deployments]
        gate = deployments[0].gate()
        results = [deployment.send("gated", str(gate), "once") for deployment in deployments]
        for deployment, result in zip(deployments, results, strict=True):
            deployment.wait_for_starts("gated", result)
        others = [start_worker(deployment.spec, wait=False) for deployment in deployments]

        for owner, other, result in zip(owners, others, results, strict=True):
            wait_until_logged([owner], "delivery acknowledgement on channel 1 timed out")
            wait_until_logged([other], f"gated[{result.id}] is held for", 4)
        gate.touch()

        for deployment, owner, other, result in zip(deployments, owners, others, results, strict=True):
            deployment.assert_ran_once("gated", {result: "once"})
            deployment.wait_until_done("gated", result, duplicates=1)
            wait_until(lambda: not owner.is_alive, describe=owner.log_tail)  # noqa: B023
            deployment.assert_ran_once("echo", {deployment.send("echo", "after it"): "after it"})
            assert len(deployment.starts("gated", result)) == 1
            other.stop()
