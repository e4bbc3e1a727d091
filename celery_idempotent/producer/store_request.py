"""Ask the store for one call, with retries, and remember whether an outcome is unknown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from celery_idempotent.core.store_retry import ask_again
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.producer.guarded import Guarded

__all__ = ["StoreRequest"]

T = TypeVar("T")


class StoreRequest:
    """Ask the store for one call; repeat by the call's or the app's retry policy.

    Args:
        task: The task that is called.
        options: The options of the call; its ``retry`` and ``retry_policy`` override the app's.

    Attributes:
        outcome_unknown: Whether a request got no answer, so that its write may have happened, or may yet happen.
    """

    def __init__(self, task: Guarded, options: Mapping[str, Any]) -> None:
        self._task = task
        self._options = options
        self.outcome_unknown = False

    def ask(self, ask: Callable[[], T]) -> T:
        """Ask the store; repeat as Celery repeats a publication while the broker is down.

        Raises:
            StoreUnavailableError: From the last attempt; ``unsent`` covers all attempts of the call.
        """

        def note_silence() -> T:
            try:
                return ask()
            except StoreUnavailableError as error:
                self.outcome_unknown = self.outcome_unknown or not error.unsent
                error.unsent = not self.outcome_unknown
                raise

        try:
            return note_silence()
        except StoreUnavailableError as error:
            silence = error
        conf, retry = self._task.app.conf, self._options.get("retry")
        if self._task.queue_log.settings.on_store_error != "retry" or not (
            conf.task_publish_retry if retry is None else retry
        ):
            raise silence
        policy = {**(conf.task_publish_retry_policy or {}), **(self._options.get("retry_policy") or {})}
        return ask_again(note_silence, policy, silence=silence)
