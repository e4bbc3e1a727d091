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
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeVar

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

    Each event loop has threads of its own, so a call whose eager body runs another event loop cannot wait for itself.

    Args:
        queue_log: The queue log.
    """

    def __init__(self, queue_log: QueueLog) -> None:
        self._conf = queue_log.app.conf
        self._made_in = os.getpid()
        self._of_loops: dict[asyncio.AbstractEventLoop, tuple[int, ThreadPoolExecutor]] = {}
        #: Those of event loops that are closed, by their number.
        self._free: list[tuple[int, ThreadPoolExecutor]] = []

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
        running = self._threads(loop).submit(copy_context().run, work)
        answer = asyncio.wrap_future(running, loop=loop)

        def ended(running: Future[T]) -> None:
            if answer.cancelled() and not running.cancelled() and (error := running.exception()) is not None:
                logger.warning("a call failed after its await was cancelled: %r", error)

        running.add_done_callback(ended)
        return await answer

    def rest(self) -> None:
        """Let idle threads end, because the app is closed."""
        for _, executor in (*self._of_loops.values(), *self._free):
            executor.shutdown(wait=False)
        self._of_loops, self._free = {}, []

    def _threads(self, loop: asyncio.AbstractEventLoop) -> ThreadPoolExecutor:
        if self._made_in != os.getpid():  # a fork has none of its parent's threads
            self._made_in = os.getpid()
            self._of_loops, self._free = {}, []
        found = self._of_loops.get(loop)
        if found is None:
            for other in list(self._of_loops):
                if other.is_closed() and (freed := self._of_loops.pop(other, None)) is not None:
                    self._free.append(freed)
            # Eager bodies run one after the other: Celery marks for the whole process that one runs, and threads would leave the mark behind.
            at_once = 1 if self._conf.task_always_eager else AT_ONCE
            free = next((free for free in self._free if free[0] == at_once), None)
            if free is not None:
                self._free.remove(free)
            found = self._of_loops[loop] = free or (at_once, ThreadPoolExecutor(at_once, "idempotent-call"))
        return found[1]


class PublishingThreads(Threads):
    """The same for publications after a commit. They wait for no transaction, so they must not wait for calls that do."""


async def off_the_loop(queue_log: QueueLog, work: Callable[[], T], threads: type[Threads] = Threads) -> T:
    """Run a function in the thread of the store's framework, if it has one, otherwise in one of ours; return what it returns."""
    if not queue_log.is_open:  # imports a driver, perhaps
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
