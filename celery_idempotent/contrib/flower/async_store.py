"""Questions to a store from an event loop, which must not wait for one that is down."""

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
    """Asks in threads: one each, so that a store that never answers keeps the loop neither from going on nor from ending.

    Threads of an executor would be waited for at the end of the program. There are few at once: what is not answered is not asked any
    more often for that.

    Args:
        at_once: How many may be unanswered.
    """

    def __init__(self, at_once: int = 6) -> None:
        self._free = at_once  # changed in the loop only

    async def ask(self, question: Callable[[], T], *, within: float | None) -> T:
        """Return the answer to a question.

        Args:
            question: What is called in a thread. It goes on when its time is up, and its answer is lost.
            within: Seconds; ``None`` for as long as it takes.

        Raises:
            StoreUnavailableError: There was no answer in time, or too many questions are unanswered.
        """
        if not self._free:
            raise StoreUnavailableError("the store has not answered what it was asked before")
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
            except Exception as error:  # noqa: BLE001 - whoever asked is to know
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(answered, value, failed)

        threading.Thread(target=run, name="idempotent-flower", daemon=True).start()
        try:
            return await asyncio.wait_for(answer, within)
        except TimeoutError:
            raise StoreUnavailableError(f"the store gave no answer within {within:g} s") from None
