"""The master dies and Sentinel makes its replica the master, which has not got everything: nothing is lost or run twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import redis
from celery.result import AsyncResult
from kombu.exceptions import OperationalError

from tests.conftest import StartWorker
from tests.integration.brokers.conftest import (
    Deploy,
    times_logged,
    wait_until_redis_has_nothing_left,
)
from tests.support.brokers import redis_broker
from tests.support.servers import PrivateRedis, PrivateSentinel
from tests.support.waiting import wait_until


@dataclass(frozen=True)
class Pair:
    """A master and its replica, watched."""

    master: PrivateRedis
    replica: PrivateRedis
    sentinel: PrivateSentinel

    def stop_replication(self) -> None:
        """Stop the master's replication from now on."""
        with redis.Redis.from_url(self.master.url) as client:
            client.execute_command("ACL", "SETUSER", "default", "-psync", "-sync")
            client.execute_command("CLIENT", "KILL", "TYPE", "replica")
        wait_until(lambda: self.replication()["master_link_status"] == "down", describe=self.replication)

    def replication(self) -> dict[str, Any]:
        """Return what the replica says of itself."""
        with redis.Redis.from_url(self.replica.url) as client:
            answer: dict[str, Any] = client.info("replication")
            return answer

    def is_copied(self) -> bool:
        """Return whether the replica has all that the master has."""
        with redis.Redis.from_url(self.master.url) as client:
            offset: int = client.info("replication")["master_repl_offset"]
        return int(self.replication()["slave_repl_offset"]) >= offset


@pytest.fixture
def pair(private_redis: PrivateRedis) -> Iterator[Pair]:
    with ExitStack() as stack:
        master = stack.enter_context(PrivateRedis())
        replica = stack.enter_context(PrivateRedis(replica_of=master))
        pair = Pair(master, replica, stack.enter_context(PrivateSentinel(master)))
        with redis.Redis.from_url(pair.sentinel.url) as client:
            wait_until(
                lambda: client.execute_command("SENTINEL", "REPLICAS", pair.sentinel.MASTER),
                describe=pair.sentinel.log_tail,
            )
        wait_until(lambda: pair.replication()["master_link_status"] == "up", describe=pair.replication)
        yield pair


def test_the_master_dies_before_its_replica_has_everything(
    deploy: Deploy, start_worker: StartWorker, pair: Pair
) -> None:
    broker = replace(redis_broker(pair.sentinel.broker_url), name="sentinel")
    deployment = deploy(
        broker,
        transport_options={"master_name": pair.sentinel.MASTER, "visibility_timeout": 10},
        idempotent_lost_after=2.0,
    )
    worker = start_worker(deployment.spec)
    gate, other_gate = deployment.gate(), deployment.gate()
    finished = deployment.send("gated", str(other_gate), "finished")
    deployment.wait_for_starts("gated", finished)
    copied = [deployment.send("echo", number) for number in range(3)]
    running = deployment.send("gated", str(gate), "running")
    wait_until(pair.is_copied, describe=pair.replication)

    def call(task_id: str) -> AsyncResult[Any] | None:
        try:
            return deployment.send("echo", task_id, task_id=task_id)
        except OperationalError:
            return None

    # The replica does not learn that these have ended, nor that others were sent.
    pair.stop_replication()
    other_gate.touch()
    echoed = {result: number for number, result in enumerate(copied)}
    deployment.assert_ran_once("gated", {finished: "finished"})
    deployment.assert_ran_once("echo", echoed)
    deployment.wait_for_starts("gated", running)
    unknown = {deployment.send("echo", text): text for text in ("unknown", "unknown too")}
    with redis.Redis.from_url(pair.replica.url) as client:
        assert (client.llen(broker.queue), client.hlen("unacked")) == (4, 1)
    pair.master.kill()
    # Its caller is refused for as long as there is no master, and calls again.
    meanwhile = wait_until(lambda: call("meanwhile"), describe=pair.sentinel.log_tail)
    wait_until(lambda: times_logged(worker, "Connected to sentinel") == 2, describe=worker.log_tail)
    gate.touch()

    deployment.assert_ran_once("gated", {running: "running", finished: "finished"})
    deployment.assert_ran_once("echo", {meanwhile: "meanwhile"})

    # They are overtaken by what is sent two seconds after them.
    def sent_before(seconds: float) -> bool:
        rows = [deployment.row("echo", result) for result in unknown]
        return all((row.read_at - row.created_timestamp).total_seconds() > seconds for row in rows)

    wait_until(lambda: sent_before(3.0), describe="they have waited")
    later = deployment.send("echo", "later")
    deployment.assert_ran_once("echo", {**echoed, **unknown, meanwhile: "meanwhile", later: "later"})
    for result in copied:
        deployment.wait_until_done("echo", result, duplicates=1)
    wait_until_redis_has_nothing_left(pair.replica.url, broker.queue)
    assert len(deployment.ledger.starts()) == 2 + 3 + 2 + 2
