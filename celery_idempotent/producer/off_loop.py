"""Run a call's blocking work in a thread while the coroutine that made the call waits for it.

The threads are ours, not the event loop's default ones, which also look up host names and run the user's ``asyncio.to_thread``. There, calls
that wait for a transaction could keep that transaction from its end.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

from celery._state import pop_current_task, push_current_task

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.queue_log import QueueLog

__all__ = ["AT_ONCE", "PublishingThreads", "Threads", "in_the_same_run", "off_the_loop"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")

#: How many calls of one event loop run in threads at once: as many as Celery keeps connections to the broker (``broker_pool_limit``), and fewer
#: than the store has. Further calls wait without a thread.
AT_ONCE = 10


class Threads:
    """The threads of one queue log in which calls run. They are started when they are needed, and used again.

    Each event loop has its own limit, so a call whose eager body runs another event loop cannot wait for itself.

    Args:
        queue_log: The queue log.
    """

    def __init__(self, queue_log: QueueLog) -> None:
        self._conf = queue_log.app.conf
        self._executor: ThreadPoolExecutor | None = None
        self._made_in = 0
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    @classmethod
    def of(cls, queue_log: QueueLog) -> Threads:
        """Return the queue log's threads in this process."""
        return queue_log.part(cls, lambda: cls(queue_log))

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function in a thread, in a copy of the current context; return what it returns.

        If the await is cancelled before a thread has begun, the function is not run. After that it runs to its end. If it then fails, the
        error is logged, because no caller is left.
        """
        loop = asyncio.get_running_loop()
        # Eager bodies run one after the other: Celery marks for the whole process that one runs, and threads would leave the mark behind.
        at_once = 1 if self._conf.task_always_eager else AT_ONCE
        turns = self._turns.setdefault(loop, asyncio.Semaphore(at_once))
        await turns.acquire()
        try:
            running = self._threads().submit(copy_context().run, work)
        except BaseException:
            turns.release()
            raise
        answer = asyncio.wrap_future(running, loop=loop)

        def ended(running: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(turns.release)
            if answer.cancelled() and not running.cancelled() and (error := running.exception()) is not None:
                logger.warning("a call failed after its await was cancelled: %r", error)

        running.add_done_callback(ended)
        return await answer

    def rest(self) -> None:
        """Let idle threads end, because the app is closed."""
        executor, self._executor = self._executor, None
        if executor is not None and self._made_in == os.getpid():
            executor.shutdown(wait=False)

    def _threads(self) -> ThreadPoolExecutor:
        if self._executor is None or self._made_in != os.getpid():  # a fork has none of its parent's threads
            # No limit here: see `AT_ONCE`.
            self._executor = ThreadPoolExecutor(max_workers=1_000_000, thread_name_prefix="idempotent-call")
            self._made_in = os.getpid()
        return self._executor


class PublishingThreads(Threads):
    """The same for publications after a commit. They wait for no transaction, so they must not wait for calls that do."""


async def off_the_loop(queue_log: QueueLog, work: Callable[[], T], threads: type[Threads] = Threads) -> T:
    """Run a function in the thread of the store's framework, if it has one, otherwise in one of ours; return what it returns."""
    if "store" not in vars(queue_log):  # imports a driver, perhaps
        await Threads.of(queue_log).run(lambda: queue_log.store)
    through: Callable[[Callable[[], T]], Awaitable[T]] | None = getattr(queue_log.store, "off_the_loop", None)
    return await (threads.of(queue_log).run if through is None else through)(work)


def in_the_same_run(app: Celery, work: Callable[[], T]) -> Callable[[], T]:
    """Return a function that does the work as part of the task that runs here, in whatever thread or greenlet it is called.

    Celery keeps the running task per greenlet, not in the context.
    """
    task = app.current_worker_task
    if task is None:
        return work
    request = task.request_stack.top

    def within() -> T:
        push_current_task(task)
        task.request_stack.push(request)
        try:
            return work()
        finally:
            task.request_stack.pop()
            pop_current_task()

    return within
