"""A store that is away: Flower goes on, and says so. The store is a Redis here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from selenium.webdriver import Chrome

from celery_idempotent import RedisStore
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage
from tests.integration.contrib.flower.conftest import value_of
from tests.integration.contrib.flower.test_page import row_of, visit, wait_for_text
from tests.support.flower import FlowerProcess
from tests.support.servers import PrivateRedis
from tests.support.shared_workers import SharedWorker

pytestmark = pytest.mark.xdist_group("flower")


@pytest.fixture
def flower(shared_worker: SharedWorker, private_redis: PrivateRedis) -> Iterator[FlowerProcess]:
    """Yield a Flower whose queue log is in a Redis of the test's own, with one message that failed."""
    store = RedisStore(private_redis.url)
    message = NewMessage(MessageKey("order:1", "fail"), "id")
    store.record(message)
    claimed = store.claim(message, worker="w@here:1", lease=60.0, grace=30.0)
    assert isinstance(claimed, Claimed)
    store.fail(claimed.claim, error="ValueError: no such card")
    store.close()
    environment = {"FLOWER_UNAUTHENTICATED_API": "true"}
    with FlowerProcess(
        shared_worker.ledger.path.parent, replace(shared_worker.spec, store=private_redis.url), environment=environment
    ) as flower:
        yield flower


def test_a_silent_store_is_shown_and_blocks_no_other_page(
    flower: FlowerProcess, private_redis: PrivateRedis, browser: Chrome
) -> None:
    visit(browser, flower, "/queue-log", credentials=None)
    wait_for_text(browser, "#alarms", "1 message has failed within the last hour")
    assert "ValueError: no such card" in row_of(browser, "#ql-failed-table", "order:1")
    assert value_of(flower, "celery_idempotent_queue_log_up") == 1.0

    private_redis.pause()

    # The page that is open finds out by itself.
    wait_for_text(browser, "#alarms", "The queue log cannot be read.", "what is below was true before", timeout=30.0)
    assert "ValueError: no such card" in row_of(browser, "#ql-failed-table", "order:1")
    began = time.monotonic()
    assert flower.get("/healthcheck").status == 200
    assert flower.get("/workers").status == 200
    assert time.monotonic() - began < 2.0
    with ThreadPoolExecutor() as at_once:
        requeue = at_once.submit(flower.post, "/api/queue-log/requeue", message_id="order:1", task_name="fail")
        message = at_once.submit(flower.get, "/queue-log/message", id="order:1", task="fail")
        metrics = at_once.submit(flower.get, "/metrics").result().text
        assert requeue.result().status == 503
        assert "The queue log cannot be read." in message.result().text
    assert "celery_idempotent_queue_log_up 0.0" in metrics
    assert 'celery_idempotent_messages{processed_status="failure",status="done",task_name="fail"} 1.0' in metrics
    assert "celery_idempotent_claims" not in metrics

    private_redis.resume()

    wait_for_text(browser, "#alarms", "1 message has failed within the last hour", timeout=30.0)
    assert value_of(flower, "celery_idempotent_queue_log_up") == 1.0


def test_a_store_that_is_down_and_a_flower_that_is_to_end(flower: FlowerProcess, private_redis: PrivateRedis) -> None:
    private_redis.pause()
    assert "The queue log cannot be read." in flower.get("/queue-log").text

    flower.process.terminate()

    assert flower.process.wait(timeout=10) == 0
