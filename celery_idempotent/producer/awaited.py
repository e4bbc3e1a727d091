"""``await task.adelay(...)``: calls from coroutines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from celery_idempotent.producer.box import block_outbox
from celery_idempotent.producer.off_loop import in_the_same_run, off_the_loop

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from celery_idempotent.producer.guarded import Guarded
    from celery_idempotent.result import IdempotentResult

__all__ = ["AwaitedCalls", "awaited"]


class AwaitedCalls:
    """The calls of a task that a coroutine awaits."""

    if TYPE_CHECKING:
        # Celery's, and the guard's around it.
        apply_async: Callable[..., IdempotentResult]

    async def aapply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> IdempotentResult:
        """Send the task as ``apply_async`` does, while the event loop goes on.

        Takes what ``apply_async`` takes, returns the same result and raises the same errors. Where it runs:

        * In ``async with outbox(async_session)``: in the session, one call after the other. The call is decided and recorded at once.
        * In the block of a plain session, an atomic body or a batch: here. The event loop waits as for the session's other statements.
        * With a store of Django: in Django's thread, by asgiref's ``sync_to_async(thread_sensitive=True)``. So the call joins a transaction of
          that thread.
        * Otherwise in a thread of ours, ten at once in each event loop. Context variables are those of the caller.

        Hazard:
            A cancelled await means that the message was sent, or not, but never half: a call that has begun goes on to its end in its
            thread, and its result, or its error, is only logged. Call again under the same message id to learn which.
            In a session, a cancelled call breaks the transaction as any cancelled statement does; roll it back.

        Atomicity: as ``apply_async``.
        """
        result: IdempotentResult = await awaited(self, partial(self.apply_async, args, kwargs, **options))  # type: ignore[arg-type]
        return result

    async def adelay(self, *args: Any, **kwargs: Any) -> IdempotentResult:
        """Send the task with these arguments; see :meth:`aapply_async`."""
        return await self.aapply_async(args, kwargs)


async def awaited(task: Guarded, call: Callable[[], AsyncResult[Any]]) -> AsyncResult[Any]:
    """Make a call where it belongs, without holding the event loop.

    Args:
        task: The task that is called.
        call: Makes the call.
    """
    queue_log = task.queue_log
    work = in_the_same_run(task.app, call)
    box = block_outbox(queue_log)
    return await (off_the_loop(queue_log, work) if box is None else box.awaited(work))
