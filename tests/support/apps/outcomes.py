"""Tasks that end in each of the ways in which a task can end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task, chain, group
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from celery_idempotent.core.records import MessageKey
from tests.support.ledger import Ledger
from tests.support.versions import CELERY
from tests.support.waiting import wait_until

__all__ = ["register"]


def first(flag: str) -> bool:
    """Return whether this is the first time."""
    try:
        Path(flag).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register all of them."""
    _retries(app, base, ledger)
    _exceptions(app, base, ledger)
    _replacements(app, base, ledger)
    _results(app, base, ledger)
    _limits(app, base, ledger)
    _losses(app, base, ledger)
    _leases(app, base, ledger)


def _retries(app: Celery, base: type[Task], ledger: Ledger) -> None:
    @app.task(base=base, bind=True, name="autoretry", autoretry_for=(ValueError,), max_retries=5, default_retry_delay=0)
    def autoretry(self: Task, times: int) -> int:
        with ledger.run(self):
            if self.request.retries < times:
                raise ValueError("once more")
            return int(self.request.retries)

    @app.task(base=base, bind=True, name="give_up", max_retries=2)
    def give_up(self: Task, own: bool = False) -> None:
        with ledger.run(self):
            raise self.retry(countdown=0, exc=ValueError("no use") if own else None)

    @app.task(base=base, bind=True, name="retry_quietly")
    def retry_quietly(self: Task, times: int) -> str:
        """Ask for a retry and go on to the end."""
        with ledger.run(self):
            if self.request.retries < times:
                self.retry(countdown=0, throw=False)
                return "of no account"
            return f"after {self.request.retries}"

    @app.task(base=base, bind=True, name="retry_changed", max_retries=5)
    def retry_changed(self: Task, names: list[str]) -> list[str]:
        """Retry with what is still to do."""
        with ledger.run(self):
            if len(names) > 1:
                raise self.retry(args=(names[1:],), countdown=0)
            return names

    @app.task(base=base, bind=True, name="mutate", max_retries=5)
    def mutate(self: Task, names: list[str], times: int) -> list[str]:
        """Change the arguments in place, and retry with them as they are."""
        with ledger.run(self):
            names.append(f"run {self.request.retries}")
            if self.request.retries < times:
                raise self.retry(countdown=0)
            return names

    @app.task(base=base, bind=True, name="retry_nowhere")
    def retry_nowhere(self: Task) -> None:
        """Retry with what no serializer takes."""
        with ledger.run(self):
            raise self.retry(args=(object(),), countdown=0)


def _exceptions(app: Celery, base: type[Task], ledger: Ledger) -> None:
    @app.task(base=base, bind=True, name="ignored")
    def ignored(self: Task) -> None:
        with ledger.run(self):
            raise Ignore("nothing to say")

    @app.task(base=base, bind=True, name="rejected", acks_late=True)
    def rejected(self: Task) -> None:
        with ledger.run(self):
            raise Reject("not for me", requeue=False)

    def requeued(self: Task, flag: str) -> str:
        """Give the message back the first time."""
        with ledger.run(self):
            if first(flag):
                raise Reject("not now", requeue=True)
            return "the second time"

    for name, acks_late in (("requeued", True), ("requeued_early", False)):
        app.task(base=base, bind=True, name=name, acks_late=acks_late)(requeued)

    class UnbuildableError(Exception):
        """Celery rebuilds an exception from its ``args``, and this one does not take them."""

        def __init__(self, code: int, *, reason: str) -> None:
            super().__init__(f"{code}: {reason}")

    @app.task(base=base, bind=True, name="fail_oddly")
    def fail_oddly(self: Task) -> None:
        with ledger.run(self):
            raise UnbuildableError(7, reason="odd")

    @app.task(base=base, bind=True, name="exit_body")
    def exit_body(self: Task) -> None:
        with ledger.run(self):
            raise SystemExit(3)


def _replacements(app: Celery, base: type[Task], ledger: Ledger) -> None:
    @app.task(base=Task, bind=True, name="plain_add")
    def plain_add(self: Task, left: int, right: int) -> int:
        """Return a task of Celery's own class, among the guarded ones."""
        with ledger.run(self):
            return left + right

    @app.task(base=base, bind=True, name="replace_by")
    def replace_by(self: Task, kind: str) -> Any:
        add, echo = app.tasks["add"], app.tasks["echo"]
        with ledger.run(self):
            replacement = {
                "guarded": lambda: add.s(1, 2),
                "identified": lambda: add.s(1, 2).set(message_id=f"{self.request.id}:replacement"),
                "plain": lambda: plain_add.s(1, 2),
                "chain": lambda: chain(add.s(1, 2), add.s(3), app=app),
                "group": lambda: group([add.s(1, 2), add.s(3, 4)], app=app),
                "unpublishable": lambda: echo.s(object()),
            }[kind]()
            return self.replace(replacement)

    @app.task(base=base, bind=True, name="replace_by_itself")
    def replace_by_itself(self: Task, left: int) -> str:
        """Count down to zero by replacing itself."""
        with ledger.run(self):
            if left:
                return self.replace(self.s(left - 1))  # type: ignore[no-any-return]
            return "zero"

    @app.task(base=base, bind=True, name="countdown_by_name", message_id="countdown:{name}", fingerprint=False)
    def countdown_by_name(self: Task, name: str, left: int, fail: bool = False) -> str:
        """Return the same under one message id."""
        with ledger.run(self):
            if left:
                return self.replace(self.s(name, left - 1, fail))  # type: ignore[no-any-return]
            if fail:
                raise ValueError("zero")
            return "zero"


def _results(app: Celery, base: type[Task], ledger: Ledger) -> None:
    @app.task(base=base, bind=True, name="forgotten", ignore_result=True)
    def forgotten(self: Task, value: Any = None) -> Any:
        with ledger.run(self):
            return value

    @app.task(base=base, bind=True, name="unkept", keep_result=False)
    def unkept(self: Task, value: Any = None) -> Any:
        with ledger.run(self):
            return value

    @app.task(base=base, bind=True, name="unserializable")
    def unserializable(self: Task) -> object:
        with ledger.run(self):
            return object()

    @app.task(base=base, bind=True, name="unserializable_unkept", keep_result=False)
    def unserializable_unkept(self: Task) -> object:
        with ledger.run(self):
            return object()

    @app.task(base=base, bind=True, name="unserializable_forgotten", ignore_result=True)
    def unserializable_forgotten(self: Task) -> object:
        with ledger.run(self):
            return object()

    @app.task(base=base, bind=True, name="told")
    def told(self: Task, *heard: Any) -> list[Any]:
        """Return what a callback was called with."""
        with ledger.run(self):
            return list(heard)

    @app.task(base=base, bind=True, name="errback")
    def errback(self: Task, task_id: str) -> str:
        """Return an errback that is sent as a message; it notes whose errback it was."""
        ledger.note("end", self, detail=task_id)
        return task_id

    @app.task(base=base, name="errback.call")
    def errback_call(request: Any, error: BaseException, traceback: Any) -> None:
        """Be an errback that is called where the task failed; Celery calls only those that are not bound."""
        ledger.note("end", app.tasks["errback.call"], detail=request.id)


def _limits(app: Celery, base: type[Task], ledger: Ledger) -> None:
    def overrun(self: Task, flag: str) -> str:
        """Run into the time limit the first time; the last thing that the second run does is to return."""
        with ledger.run(self):
            if first(flag):
                time.sleep(600)
            return "in time"

    app.task(overrun, base=base, bind=True, name="soft", soft_time_limit=2)

    def limited(name: str, **options: Any) -> None:
        app.task(overrun, base=base, bind=True, name=name, time_limit=2, **options)

    # Until Celery 5.7 it is one option with that of failures.
    kept = {"acks_on_timeout" if CELERY >= (5, 7) else "acks_on_failure_or_timeout": False}
    limited("hard.early")
    limited("hard.early.unacknowledged", **kept)
    limited("hard.late", acks_late=True)
    limited("hard.late.unacknowledged", acks_late=True, **kept)

    @app.task(base=base, bind=True, name="soft.tidy", soft_time_limit=2)
    def tidy(self: Task) -> str:
        """Take the soft limit as a hint and end well."""
        with ledger.run(self):
            try:
                time.sleep(600)
            except SoftTimeLimitExceeded:
                return "cut short"
            return "never"


def _losses(app: Celery, base: type[Task], ledger: Ledger) -> None:
    def die(self: Task, flag: str) -> str:
        """Take the pool's process along the first time, without a last word."""
        with ledger.run(self):
            if first(flag):
                os.kill(os.getpid(), signal.SIGKILL)
            return "survived"

    def losing(name: str, **options: Any) -> None:
        # This lease is never waited for: a lost worker is handled at once.
        app.task(die, base=base, bind=True, name=name, lease=3600, **options)

    @app.task(base=base, bind=True, name="die.unstored", lease=3600)
    def die_unstored(self: Task, gate: str | None = None) -> dict[str, str]:
        """Take the pool's process along between the end of its row and its result, when the test opens the gate."""
        store = self.queue_log.store
        key = MessageKey(self.request.properties["message_id"], self.name)

        class Fatal(dict[str, str]):
            def items(_) -> Any:  # noqa: N805
                if store.find(key).status == "done":
                    if gate is not None:
                        wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().items()

        with ledger.run(self):
            return Fatal(value="stored by another")

    losing("die.early")
    losing("die.late", acks_late=True)
    losing("die.late.rejected", acks_late=True, reject_on_worker_lost=True)
    losing("die.late.rejected.fail", acks_late=True, reject_on_worker_lost=True, on_abandoned="fail")
    losing("die.retried", retry_on_worker_lost=True, default_retry_delay=0)
    losing("die.late.retried", acks_late=True, retry_on_worker_lost=True, default_retry_delay=0)


def _leases(app: Celery, base: type[Task], ledger: Ledger) -> None:
    def gated(self: Task, gate: str, value: Any = None) -> Any:
        with ledger.run(self):
            wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            return value

    app.task(gated, base=base, bind=True, name="busy.hold", on_processing="hold")
    app.task(gated, base=base, bind=True, name="busy.window", on_processing="hold", unique_for=0.1)
    app.task(gated, base=base, bind=True, name="busy.skip", on_processing="skip")
    app.task(gated, base=base, bind=True, name="busy.raise", on_processing="raise")
    app.task(gated, base=base, bind=True, name="left.rerun", on_abandoned="rerun")
    app.task(gated, base=base, bind=True, name="left.fail", on_abandoned="fail")
    app.task(gated, base=base, bind=True, name="left.late", acks_late=True)
    app.task(gated, base=base, bind=True, name="left.early", acks_late=False)

    @app.task(base=base, bind=True, name="left.retry", on_abandoned="rerun", max_retries=2)
    def left_retry(self: Task, times: int, countdown: float) -> int:
        """Retry so many times, then return the number of retries."""
        with ledger.run(self):
            if self.request.retries < times:
                raise self.retry(countdown=countdown)
            return int(self.request.retries)

    @app.task(base=base, bind=True, name="gated_retry")
    def gated_retry(self: Task, gate: str) -> None:
        """Wait for the gate, and retry at once."""
        with ledger.run(self):
            wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            raise self.retry(countdown=0)
