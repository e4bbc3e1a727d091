"""Threads for the calls of coroutines: turns, cancelled awaits, event loops, forks."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial

import pytest
from celery import Celery

from celery_idempotent import QueueLog
from celery_idempotent.producer.off_loop import AT_ONCE, PublishingThreads, Threads


@pytest.fixture
def queue_log() -> Iterator[QueueLog]:
    app = Celery("threads", set_as_current=False)
    yield QueueLog(app)
    app.close()


@pytest.fixture
def threads(queue_log: QueueLog) -> Threads:
    return Threads.of(queue_log)


class Gate:
    """Work that waits until it is let through."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.within = threading.Semaphore(0)
        self.done: list[int] = []

    def work(self, number: int) -> Callable[[], int]:
        def work() -> int:
            self.within.release()
            assert self.opened.wait(30)
            self.done.append(number)
            return number

        return work

    async def is_full(self) -> None:
        for _ in range(AT_ONCE):
            await asyncio.to_thread(self.within.acquire, True, 30)


def test_ten_run_at_once_and_the_others_wait(threads: Threads) -> None:
    gate = Gate()

    async def work() -> list[int]:
        tasks = [asyncio.create_task(threads.run(gate.work(number))) for number in range(3 * AT_ONCE)]
        await gate.is_full()
        assert not await asyncio.to_thread(gate.within.acquire, True, 0.2), "no further one has begun"
        gate.opened.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(work()) == list(range(3 * AT_ONCE))


def test_publications_do_not_wait_for_calls(queue_log: QueueLog, threads: Threads) -> None:
    gate = Gate()

    async def work() -> None:
        tasks = [asyncio.create_task(threads.run(gate.work(number))) for number in range(2 * AT_ONCE)]
        await gate.is_full()
        async with asyncio.timeout(10):
            assert await PublishingThreads.of(queue_log).run(lambda: "published") == "published"
        gate.opened.set()
        await asyncio.gather(*tasks)

    asyncio.run(work())


def test_work_that_is_cancelled_before_its_turn_is_not_done(threads: Threads) -> None:
    gate = Gate()

    async def work() -> None:
        tasks = [asyncio.create_task(threads.run(gate.work(number))) for number in range(AT_ONCE)]
        await gate.is_full()
        waiting = asyncio.create_task(threads.run(gate.work(-1)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.opened.set()
        await asyncio.gather(*tasks)
        assert await threads.run(gate.work(7)) == 7, "and its turn is another's"

    asyncio.run(work())
    assert -1 not in gate.done


@pytest.mark.parametrize("fails", [False, True])
def test_work_that_is_cancelled_in_its_thread_goes_on(
    threads: Threads, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def slowly() -> None:
        begun.set()
        assert go_on.wait(30)
        ended.set()
        if fails:
            raise ValueError("no such order")

    async def work() -> None:
        task = asyncio.create_task(threads.run(slowly))
        assert await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not ended.is_set()
        go_on.set()
        # As many as there are turns: none was lost.
        await asyncio.gather(*(threads.run(ended.wait) for _ in range(2 * AT_ONCE)))

    with caplog.at_level(logging.WARNING, "celery_idempotent"):
        asyncio.run(work())
    assert ended.is_set()
    assert ("no such order" in caplog.text) is fails


def test_work_may_run_another_event_loop(threads: Threads) -> None:
    """As an eager body may; with one limit for all loops, it would wait for itself."""

    def outer(number: int) -> int:
        return asyncio.run(threads.run(lambda: number))

    async def work() -> list[int]:
        async with asyncio.timeout(30):
            return await asyncio.gather(*(threads.run(partial(outer, number)) for number in range(3 * AT_ONCE)))

    assert asyncio.run(work()) == list(range(3 * AT_ONCE))


def test_eager_bodies_run_one_at_a_time(queue_log: QueueLog) -> None:
    queue_log.app.conf.task_always_eager = True
    running: list[int] = []

    def body() -> int:
        running.append(1)
        try:
            return len(running)
        finally:
            running.pop()

    async def work() -> list[int]:
        return await asyncio.gather(*(Threads.of(queue_log).run(body) for _ in range(50)))

    assert asyncio.run(work()) == [1] * 50


def test_work_has_the_callers_context_and_errors(threads: Threads) -> None:
    tenant: ContextVar[str] = ContextVar("tenant")

    def fail() -> None:
        raise ValueError(tenant.get())

    async def work() -> None:
        tenant.set("a")
        with pytest.raises(ValueError, match="a"):
            await threads.run(fail)

    asyncio.run(work())


@pytest.mark.parametrize("why", ["a fork", "the app was closed"])
def test_threads_are_made_anew(threads: Threads, why: str) -> None:
    async def look() -> threading.Thread:
        return await threads.run(threading.current_thread)

    before = asyncio.run(look())
    assert asyncio.run(look()) is before, "the next event loop has those of the one before"
    if why == "a fork":
        threads._made_in = -1
    else:
        threads.rest()
    assert asyncio.run(look()) is not before
