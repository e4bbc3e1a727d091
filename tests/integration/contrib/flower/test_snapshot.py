"""How often Flower asks the store, because a log can be long."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_idempotent import QueueLog, SQLStore
from celery_idempotent.contrib.flower.async_store import Questions
from celery_idempotent.contrib.flower.snapshot import Snapshot
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, Row, RowFilter, TaskCount
from celery_idempotent.errors import StoreUnavailableError
from tests.integration.contrib.flower.conftest import value_of
from tests.support.deployment import unique
from tests.support.flower import FlowerProcess
from tests.support.shared_workers import SharedWorker
from tests.support.stores import sqlite_store
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group("flower")


class Observed(SQLStore):
    """A store that notes how often it is counted, and counts when it is let."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.counted = 0
        self.let = threading.Event()
        self.let.set()
        self.searched: list[str] = []
        self.search = threading.Event()
        self.search.set()

    def rows(self, where: RowFilter) -> Iterator[Row]:
        if where.message_id is not None:
            self.searched.append(where.message_id)
            self.search.wait(30.0)
        return super().rows(where)

    def counts(self) -> list[TaskCount]:
        self.counted += 1
        self.let.wait(30.0)
        return super().counts()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Observed]:
    store = Observed(sqlite_store(tmp_path))
    store.init()
    yield store
    store.let.set()
    store.search.set()
    store.close()


@pytest.fixture
def snapshot(store: Observed) -> Snapshot:
    app = Celery("watched", broker="memory://", set_as_current=False)
    QueueLog(app, store=store)
    return Snapshot(app)


def test_many_who_look_at_once_have_it_counted_once(store: Observed, snapshot: Snapshot) -> None:
    async def look() -> None:
        await asyncio.gather(*(snapshot.look() for _ in range(50)))
        await snapshot.look()

    asyncio.run(look())

    assert store.counted == 1
    assert snapshot.glance is not None
    assert snapshot.counted is not None


def test_a_slow_count_blocks_no_page_and_runs_once(store: Observed, snapshot: Snapshot) -> None:
    async def look() -> None:
        store.let.clear()
        began = asyncio.get_running_loop().time()
        for _ in range(3):
            await snapshot.look()
        assert asyncio.get_running_loop().time() - began < 10.0
        assert snapshot.counted is None
        assert snapshot.counting_for is not None
        assert snapshot.glance is not None
        store.let.set()
        await snapshot.look()

    asyncio.run(look())

    assert store.counted == 1
    assert snapshot.counted is not None


def test_a_slow_search_runs_once_and_blocks_no_other(store: Observed, snapshot: Snapshot) -> None:
    """Open tabs that reload themselves, each with a search that is slower than its page waits."""
    store.record(NewMessage(MessageKey("order:1", "charge"), "id"))

    async def look() -> None:
        store.search.clear()
        for _ in range(10):
            for pattern in ("order:*", "*:1", "one more*"):
                with pytest.raises(StoreUnavailableError):
                    await snapshot.search(pattern, limit=10, patience=0.01)
        await snapshot.look()
        assert snapshot.glance is not None, "the store answers"
        assert await snapshot.ask(lambda: "answer", within=5.0) == "answer"
        store.search.set()
        assert [row.task_id for row in await snapshot.search("order:*", limit=10, patience=30.0)] == ["id"]
        assert await snapshot.search("ord\udcff*", limit=10, patience=30.0) == []
        assert await snapshot.search("ord\0*", limit=10, patience=30.0) == []

    asyncio.run(look())

    assert sorted(store.searched) == ["*:1", "order:*"], "two at once, and each once"


def test_a_count_that_took_long_is_good_for_twenty_times_as_long(store: Observed, snapshot: Snapshot) -> None:
    kept = snapshot._counted
    assert kept._good(0.01) == 5.0
    assert kept._good(30.0) == 600.0


def test_the_last_failure_comes_first_and_requeued_ones_are_not_listed(store: Observed, snapshot: Snapshot) -> None:
    def record(message_id: str) -> NewMessage:
        message = NewMessage(MessageKey(message_id, "charge"), f"id of {message_id}", message=b"x")
        store.record(message)
        return message

    messages = {name: record(name) for name in ("first", "second", "forgotten")}

    def fail(message: NewMessage) -> None:
        claimed = store.claim(message, worker="w", lease=60.0, grace=30.0)
        assert isinstance(claimed, Claimed)
        store.fail(claimed.claim, error=f"ValueError: {message.key.message_id}")
        row = store.find(message.key)
        assert row is not None
        ended = row.processed_timestamp
        assert ended is not None
        # SQLite's clock tells milliseconds, and two messages may fail within one.
        wait_until(lambda: store.health().read_at > ended, timeout=5.0)

    for name in ("second", "first", "forgotten"):
        fail(messages[name])
    forgotten = store.find(messages["forgotten"].key)
    assert forgotten is not None
    store.forget(forgotten)
    asyncio.run(snapshot.look())
    assert [row.key.message_id for row in snapshot.failed] == ["first", "second"]

    snapshot.changed(messages["first"].key)
    row = store.find(messages["first"].key)
    assert row is not None
    assert store.resubmit(row, messages["first"])
    asyncio.run(snapshot.look())

    assert [row.key.message_id for row in snapshot.failed] == ["second"]


def test_a_table_that_was_not_made_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    app = Celery("watched", broker="memory://", idempotent_store=f"sqlite:///{path}", set_as_current=False)
    snapshot = Snapshot(app)

    asyncio.run(snapshot.look())

    assert snapshot.error is None
    assert snapshot.counted is not None
    assert snapshot.counted.counts == ()
    assert not path.exists()
    snapshot.queue_log.close()


def test_a_silent_store_is_asked_a_few_times() -> None:
    never, asked = threading.Event(), []

    def question() -> Any:
        asked.append(1)
        never.wait(60.0)

    async def ask() -> None:
        questions = Questions(at_once=2)
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match=r"no answer within 0.05 s"):
                await questions.ask(question, within=0.05)
        with pytest.raises(StoreUnavailableError, match="has not answered earlier questions yet"):
            await questions.ask(question, within=0.05)
        never.set()
        await asyncio.to_thread(wait_until, lambda: questions._free == 2)
        assert await questions.ask(lambda: "answer", within=5.0) == "answer"

    asyncio.run(ask())

    assert len(asked) == 2


def test_each_series_is_there_and_tells_what_the_store_does(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    message_id = unique("done")
    shared_worker.task("echo").apply_async((1,), message_id=message_id).get(timeout=30)
    shared_worker.task("echo").apply_async((1,), message_id=message_id)
    text = flower.get("/metrics").text

    documented = Path(__file__).resolve().parents[4].joinpath("docs/how-to/flower.md").read_text()
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE celery_idempotent_")}
    assert names == {word for word in documented.replace("`", " ").split() if word.startswith("celery_idempotent_")}
    assert value_of(flower, "celery_idempotent_queue_log_up") == 1.0
    assert value_of(flower, 'celery_idempotent_message_duplicates{task_name="echo"}') >= 0


def test_a_worker_does_without_flower() -> None:
    script = (
        "import sys\n"
        "from celery import Celery\n"
        "from celery_idempotent import IdempotentTask\n"
        "from celery_idempotent.contrib import flower\n"
        "app = Celery('a', broker='memory://', idempotent_store='postgresql://nowhere/db')\n"
        "flower.install(app)\n"
        "print(*sys.modules, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert set(done.stdout.split()).isdisjoint({"flower", "tornado", "prometheus_client", "sqlalchemy"})


def test_an_app_that_is_installed_twice_has_one_page() -> None:
    script = (
        "from celery import Celery\n"
        "import flower.app\n"
        "from flower import urls\n"
        "from celery_idempotent.contrib import flower as contrib\n"
        "before = len(urls.handlers)\n"
        "contrib.install(Celery('a'))\n"
        "contrib.install(Celery('b'))\n"
        "print(len(urls.handlers) - before, urls.handlers[0].kwargs['snapshot'].queue_log)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "4 <QueueLog of b>"
