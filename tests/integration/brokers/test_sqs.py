"""SQS by its documented behaviour: each copy looks like the first, has a handle of its own, and comes while the first still runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Ignore

from celery_idempotent import IdempotentTask, QueueLog, SQLStore
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage
from celery_idempotent.message.header import Header
from celery_idempotent.worker.admission import admit
from tests.conftest import StartWorker
from tests.integration.brokers.conftest import BrokerDeployment, Deploy, wait_until_logged
from tests.integration.brokers.sqs import MAX_DELAY_SECONDS
from tests.support.brokers import Broker, filesystem_broker
from tests.support.versions import CELERY
from tests.support.waiting import TIMEOUT, wait_until

#: Seconds after which a message that was received and not deleted is received again. On a transport without an event loop, Celery 5.5 and
#: 5.6 delete a message only after they have waited 2 s for another one.
VISIBILITY = 2 if CELERY >= (5, 7) else 6

DeployOnSQS = Callable[..., BrokerDeployment]


@pytest.fixture
def deploy_on_sqs(deploy: Deploy, tmp_path: Path) -> DeployOnSQS:
    """Return an app on such a broker, and whether an old receipt handle deletes."""

    def deploy_on_sqs(stale_handles_delete: bool, **settings: Any) -> BrokerDeployment:
        files = filesystem_broker(tmp_path)
        broker = Broker(
            name="sqs",
            url=files.url,
            queue=files.queue,
            transport_options={
                **files.transport_options,
                "visibility_timeout": VISIBILITY,
                "stale_handles_delete": stale_handles_delete,
            },
            settings={"broker_transport": "tests.integration.brokers.sqs:Transport"},
        )
        return deploy(broker, **settings)

    return deploy_on_sqs


def messages(deployment: BrokerDeployment) -> list[Path]:
    """Return what is in the queue, visible or not."""
    return list(Path(deployment.spec.transport_options["data_folder_in"]).glob(f"*.{deployment.spec.queue}.msg"))


def wait_until_nothing_is_left(deployment: BrokerDeployment) -> None:
    wait_until(lambda: not messages(deployment), describe=lambda: messages(deployment))


either = pytest.mark.parametrize(
    "stale_handles_delete", [False, True], ids=["stale handles void", "stale handles delete"]
)


@either
def test_a_task_that_runs_for_longer_than_the_visibility_timeout(
    deploy_on_sqs: DeployOnSQS, start_worker: StartWorker, stale_handles_delete: bool
) -> None:
    deployment = deploy_on_sqs(stale_handles_delete)
    workers = [start_worker(deployment.spec, wait=False) for _ in range(2)]
    for worker in workers:
        worker.wait_until_ready()
    gate = deployment.gate()
    result = deployment.send("gated", str(gate), "once")

    wait_until_logged(workers, f"gated[{result.id}] is held for", 3)
    gate.touch()

    deployment.assert_ran_once("gated", {result: "once"})
    wait_until_nothing_is_left(deployment)
    assert len(deployment.starts("gated", result)) == 1
    assert deployment.row("gated", result).duplicates >= 1


@either
def test_the_owner_dies_after_its_copy_was_held(
    deploy_on_sqs: DeployOnSQS, start_worker: StartWorker, stale_handles_delete: bool
) -> None:
    """The hold deletes the broker's only copy, by the latest handle: the delayed one is there by then."""
    deployment = deploy_on_sqs(stale_handles_delete, idempotent_lease=4, idempotent_recovery_interval=0)
    owner = start_worker(deployment.spec)
    gate = deployment.gate()
    result = deployment.send("gated", str(gate), "at last")
    deployment.wait_for_starts("gated", result)
    other = start_worker(deployment.spec)
    wait_until_logged([other], f"gated[{result.id}] is held for")

    owner.kill()
    gate.touch()

    assert result.get(timeout=TIMEOUT) == "at last"
    wait_until_nothing_is_left(deployment)
    row = deployment.wait_until_done("gated", result)
    assert (row.processed_status, row.token) == ("success", 2)
    assert (len(deployment.starts("gated", result)), len(deployment.ledger.ends(task_id=result.id))) == (2, 1)


def test_an_eta_beyond_the_visibility_timeout(deploy_on_sqs: DeployOnSQS, start_worker: StartWorker) -> None:
    """It is no delay of the broker's, which could not be as long: workers keep a copy each, and all come due at once."""
    deployment = deploy_on_sqs(False)
    workers = [start_worker(deployment.spec, wait=False) for _ in range(2)]
    for worker in workers:
        worker.wait_until_ready()

    sent_at = time.time()
    result = deployment.send("slow", 3, "on time", countdown=5)

    (start,) = deployment.wait_for_starts("slow", result)
    assert sent_at + 5 <= start.at < sent_at + 15
    deployment.assert_ran_once("slow", {result: "on time"})
    wait_until_nothing_is_left(deployment)
    assert len(deployment.starts("slow", result)) == 1
    wait_until_logged(workers, f"Task slow[{result.id}] received", 2)


def test_a_countdown_beyond_what_the_broker_can_delay(deploy_on_sqs: DeployOnSQS) -> None:
    deployment = deploy_on_sqs(False)

    deployment.send("echo", "tomorrow", countdown=MAX_DELAY_SECONDS * 96)
    with pytest.raises(ValueError, match="DelaySeconds"):
        deployment.send("echo", "delayed by the broker", delay_seconds=MAX_DELAY_SECONDS + 1)

    assert len(messages(deployment)) == 1


@pytest.mark.parametrize(
    ("url", "transport_options", "longest"),
    [
        ("sqs://", {}, 900.0),
        ("sqs://", {"visibility_timeout": 60}, 30.0),
        ("redis://", {}, 1800.0),
        ("rediss://", {}, 1800.0),
        ("sentinel://one:26379;sentinel://two:26379", {}, 1800.0),
        (["redis://one", "redis://two"], {}, 1800.0),
        ("filesystem://", {"visibility_timeout": 2}, 1.0),
        ("amqp://", {}, 900.0),
        ("memory://", {}, None),
    ],
)
def test_a_copy_is_held_for_no_longer_than_half_the_visibility_timeout(
    monkeypatch: pytest.MonkeyPatch, url: str | list[str], transport_options: dict[str, Any], longest: float | None
) -> None:
    """It waits in a worker, unacknowledged. Where there is no such timeout, the lease is the limit."""
    lease, countdowns = 7200.0, list[float]()
    app = Celery("holds", set_as_current=False, broker=url, backend="disabled://")
    app.conf.broker_transport_options = transport_options
    store = SQLStore("sqlite://")
    QueueLog(app, store=store)

    @app.task(base=IdempotentTask, name="task", shared=False, lease=lease)
    def task() -> None: ...

    bound = app.tasks["task"]
    monkeypatch.setattr(type(bound), "publish_copy", lambda self, request, key, countdown: countdowns.append(countdown))
    owned = NewMessage(MessageKey("m", "task"), "m")
    assert isinstance(store.claim(owned, worker="owner", lease=lease, grace=0.0), Claimed)
    # Held often enough before that the first, short hold is not the limit.
    headers = Header("m", "task", "m", holds=20).write(None)

    with pytest.raises(Ignore):
        admit(bound, Context(id="m", task="task", retries=0, args=[], kwargs={}, headers=headers))

    (countdown,) = countdowns
    if longest is None:
        assert lease - 60 < countdown < lease + 60
    else:
        assert countdown == longest
    store.close()
    app.close()
