"""Call a store from an event loop, which must not wait for a store that is down."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from celery_idempotent.errors import StoreUnavailableError

__all__ = ["Questions"]

T = TypeVar("T")


class Questions:
    """Ask each question in its own daemon thread, so that a store that never answers blocks neither the event loop nor its end.

    An executor's threads would be waited for at exit. The number of threads is limited, so unanswered questions do not pile up.

    Args:
        at_once: How many questions may be unanswered.
    """

    def __init__(self, at_once: int = 6) -> None:
        self._free = at_once  # changed only in the event loop

    async def ask(self, question: Callable[[], T], *, within: float | None) -> T:
        """Return the answer to a question.

        Args:
            question: Called in a thread. After its time is up it continues, and its answer is dropped.
            within: Seconds; ``None`` for no limit.

        Raises:
            StoreUnavailableError: There was no answer in time, or too many questions are unanswered.
        """
        if not self._free:
            raise StoreUnavailableError("the store has not answered earlier questions yet")
        self._free -= 1
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def answered(value: Any, error: BaseException | None) -> None:
            self._free += 1
            if answer.done():
                return
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        def run() -> None:
            value, failed = None, None
            try:
                value = question()
            except Exception as error:  # noqa: BLE001 - the caller gets it
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(answered, value, failed)

        threading.Thread(target=run, name="idempotent-flower", daemon=True).start()
        try:
            return await asyncio.wait_for(answer, within)
        except TimeoutError:
            raise StoreUnavailableError(f"the store gave no answer within {within:g} s") from None
