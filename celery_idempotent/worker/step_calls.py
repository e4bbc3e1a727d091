"""The methods of a task by which its body takes steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from celery.utils import uuid

from celery_idempotent.errors import IdempotentError
from celery_idempotent.worker.run import Passage, Run
from celery_idempotent.worker.steps import Steps

__all__ = ["StepCalls"]

P = ParamSpec("P")
T = TypeVar("T")

#: The attribute of Celery's request that holds the steps of a direct call.
_STEPS = "idempotent_steps"


class StepCalls:
    """``self.step()`` and ``self.step_key()``."""

    name: Any
    app: Any
    request_stack: Any

    def step(self, name: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function once per message, and keep what it returns: reruns, retries and takeovers of the message get that.

        Args:
            name: The name of the step, unlike the other names in this body. Any text; a loop numbers its steps.
            function: What to call. It is called by this thread, with the arguments that follow.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What the function returned, encoded and decoded by the app's result serializer, also the first time: with JSON, a tuple is a list.

        Raises:
            ConfigurationError: The name is empty or no text, or the function is an ``async def``.
            IdempotentError: The name is taken in this run; the body has ended, or retried or replaced itself; or another thread than the
                body's calls this.
            kombu.exceptions.EncodeError: The serializer cannot take what the function returned. The function has run.
            LeaseLostError: Another worker has taken the message over. The function may have run; nothing was kept. Let the error pass.
            StoreError: The store gave no answer, in an eager call or with ``idempotent_on_store_error="raise"``.
            Exception: The function's own. Then nothing is kept.

        Hazard:
            If the worker dies after the function's effect and before it is kept, or if what it returned is too large for the store, a rerun calls
            the function again. Give the service that it calls the :meth:`step_key`.

        Atomicity: one statement for each step. In an atomic body, a step is undone with its transaction. Outside of a guarded run (a direct call,
        or the guard is off) the function is called, and nothing is kept.
        """
        return cast("T", self._steps(begun=True).take(name, function, args, kwargs))

    def step_key(self, name: str) -> str:
        """Return an idempotency key for a step, to pass on to the service that its function calls.

        Args:
            name: The step's name.

        Returns:
            A text of 36 characters in the form of a UUID. It is the same in each rerun, retry and takeover of the message, and after ``requeue``. It
            is another one for another name, task or message, and after ``resubmit_failed``.

        Raises:
            ConfigurationError: The name is empty or no text.
            IdempotentError: Another thread than the body's calls this.
            LeaseLostError: Another worker has taken the message over.
            StoreError: As for :meth:`step`.
        """
        return self._steps(begun=False).key(name)

    def _steps(self, *, begun: bool) -> Steps:
        request = self.request_stack.top
        if request is None:
            raise IdempotentError(
                f"the steps of task {self.name} are taken in the thread that runs its body, and here none runs: if the body starts threads, "
                f"let them return to it; to run the task without a worker, call it, {self.name.rpartition('.')[2]}(...), or use apply()"
            )
        run = Run.of(request)
        if run is None:  # a direct call
            steps: Steps | None = getattr(request, _STEPS, None)
            if steps is None:
                steps = Steps(self.app, self.name, uuid())
                setattr(request, _STEPS, steps)
            return steps
        if begun and run.passage is Passage.OUTSIDE:
            raise IdempotentError(f"{run}: a step is taken in the body, which has not begun")
        return run.steps
