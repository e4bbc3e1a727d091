"""``make screenshots``: the pictures of docs/how-to/flower.md, of a real Flower, a worker and their traffic."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from celery import Celery
from PIL import Image
from selenium.webdriver import Chrome

from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, Status
from celery_idempotent.message.serialization import encode_message
from tests.support.apps import AppSpec, close_app
from tests.support.brokers import redis_broker
from tests.support.browser import open_browser
from tests.support.flower import FlowerProcess
from tests.support.servers import KINDS, PrivateRedis
from tests.support.stores import postgresql_store
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

TARGET = Path(__file__).resolve().parents[2] / "docs" / "how-to"

#: A screenshot is kept below this, in bytes.
_MODEST = 200_000


def traffic(app: Celery, gate: str) -> None:
    """Make the traffic of a night."""
    charge, ship, notify, export = (
        app.tasks[name] for name in ("shop.charge", "shop.ship", "shop.notify", "reports.export")
    )
    orders = [f"10{number}" for number in range(40, 72)]
    charged = [charge.delay(order, 500) for order in orders]
    for order in orders:
        ship.delay(order)
        notify.delay(order)
    for order in orders[::3]:
        charge.delay(order, 500)  # a caller that tries again
    for result in charged:
        result.get(timeout=60)
    charge.delay("1081", 900, declined=True)
    for order in ("1074", "1077", "1078"):
        charge.delay(order, 120, down=True)
    for order in orders[5:9]:  # delivered again
        first = app.queue_log.store.find(MessageKey(f"order:{order}", "shop.charge"))
        charge.publish((order, 500), {}, message_id=f"order:{order}", task_id=first.task_id)
    for month in ("2026-09", "2026-10"):
        export.delay(month, gate)
    wait_until(lambda: running(app) == 2, timeout=30)
    export.publish(("2026-10", gate), {}, message_id="export:2026-10", task_id=str(uuid4()))
    for order in ("1090", "1091", "1092"):
        notify.apply_async((order,), countdown=7200)
    lost(app, "parcel:1099", "shop.ship", "worker-3@shop:4012")


def running(app: Celery) -> int:
    """How many messages run."""
    return sum(count.rows for count in app.queue_log.store.counts() if count.status is Status.PROCESSING)


def lost(app: Celery, message_id: str, task: str, worker: str) -> None:
    """Leave a message whose worker is gone; its lease is over."""
    data = encode_message((message_id.partition(":")[2],), {}, {}, serializer="json")
    message = NewMessage(MessageKey(message_id, task), str(uuid4()), queue=app.conf.task_default_queue, message=data)
    claimed = app.queue_log.store.claim(message, worker=worker, lease=0.01, grace=30.0)
    assert isinstance(claimed, Claimed), message_id


def take(browser: Chrome, name: str, *, most: int = 2600) -> None:
    """Take a picture of the whole page."""
    height = browser.execute_script(
        "return document.documentElement.scrollHeight + window.outerHeight - window.innerHeight"
    )
    browser.set_window_size(1280, min(int(height), most))
    path = TARGET / name
    browser.save_screenshot(str(path))
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size / 1000:.0f} kB", file=sys.stderr)
    assert size < _MODEST, f"{name} is larger than {_MODEST} bytes"
    browser.set_window_size(1280, 900)


@contextmanager
def site(directory: Path) -> Iterator[tuple[AppSpec, Celery]]:
    """Yield an app on a Redis of its own, its queue log in PostgreSQL, and a worker."""
    with PrivateRedis() as redis, postgresql_store(KINDS["postgresql"].url) as store:
        broker = redis_broker(redis.url)
        spec = AppSpec(
            broker=broker.url,
            backend=redis.url,
            store=store,
            queue="shop",
            ledger=str(directory / "ledger"),
            tasks=("tests.support.apps.shop",),
            transport_options=broker.transport_options,
            settings={"worker_send_task_events": True, "idempotent_recovery_interval": 1},
        )
        app = spec.build()
        app.finalize()
        app.queue_log.init()
        worker = WorkerProcess(directory, spec.environment(), concurrency=4, hostname="worker-1@shop")
        try:
            worker.start()
            yield spec, app
        finally:
            worker.stop()
            close_app(app)


def main() -> None:
    """Take them."""
    with TemporaryDirectory() as temporary, open_browser() as browser, site(Path(temporary)) as (spec, app):
        directory = Path(temporary)
        gate = str(directory / "gate")
        with FlowerProcess(
            directory, spec, "--auto_refresh=False", environment={"FLOWER_UNAUTHENTICATED_API": "true"}
        ) as flower:
            wait_until(lambda: 'flower_worker_online{worker="worker-1@shop"} 1.0' in flower.get("/metrics").text)
            traffic(app, gate)
            url = f"{flower.url}/queue-log"
            wait_until(lambda: "abandoned" in flower.get("/queue-log").text, timeout=60)
            wait_until(lambda: "ql-held-table" in flower.get("/queue-log").text, timeout=60)
            time.sleep(
                12
            )  # so that what is said to have been some seconds ago was not just now, and all of it is counted
            browser.get(url)
            take(browser, "flower-queue-log.png")
            browser.get(f"{url}?q=order:1081")
            take(browser, "flower-message.png")
            Path(gate).touch()


if __name__ == "__main__":
    main()
