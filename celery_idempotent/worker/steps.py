"""The steps of a body: what each function returned is kept in the row, and given back when the body runs again.

The row is written once for each step, after its function has returned, by a write that the claim's token fences. It is read at most once in a
run: at the first step, if the row was claimed before. ADR 29.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from celery_idempotent.core.records import Row, Status
from celery_idempotent.core.store_retry import ask_until_answered
from celery_idempotent.errors import ConfigurationError, IdempotentError, LeaseLostError
from celery_idempotent.message.canvas_ids import derived
from celery_idempotent.message.kept_steps import KeptStep, pack_steps, unpack_steps
from celery_idempotent.message.serialization import UndecodableError
from celery_idempotent.worker.celery_versions import replacements
from celery_idempotent.worker.claimed_row import AWAY, ClaimedRow
from celery_idempotent.worker.lease_renewal import LeaseRenewer
from celery_idempotent.worker.run_state import Claimed, Lost, Unguarded
from celery_idempotent.worker.unstorable import Keeping

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.message.header import Header

__all__ = ["RowSteps", "Steps"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")


class Steps:
    """The steps of a body that runs without a message: nothing is kept.

    Args:
        app: The app, whose result serializer encodes what the functions return.
        task_name: The task.
        call: Differs for each call.
    """

    def __init__(self, app: Celery, task_name: str, call: str) -> None:
        self._app = app
        self._task_name = task_name
        self._call = call
        #: The steps of this run that have returned, and those that have begun.
        self._taken: set[str] = set()

    def take(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what a step returned before; otherwise call its function, keep what it returns, and return that.

        Raises:
            ConfigurationError: The name is not a text, or the function is a coroutine function.
            IdempotentError: The name is taken, or the body is over.
            kombu.exceptions.EncodeError: What the function returned cannot be kept.
            LeaseLostError: The claim is gone.
        """
        check_name(name)
        if inspect.iscoroutinefunction(function):
            raise ConfigurationError(
                f"step {name!r} is given an `async def`, which nothing would await: give it a function that calls asyncio.run()"
            )
        self._check_run(name)
        if name in self._taken:
            raise IdempotentError(
                f"step {name!r} was taken before in this run: give each step of a body a name of its own, such as {name + ' 2'!r}"
            )
        self._taken.add(name)
        try:
            kept = self._kept(name)
            if kept is None:
                self._before()
                kept = KeptStep.of(self._app, name, self.key(name), function(*args, **kwargs))
                self._keep(kept)
            return self._decoded(kept)
        except BaseException:
            self._taken.discard(name)  # the body may try again
            raise

    def key(self, name: str) -> str:
        """Return the step's idempotency key."""
        check_name(name)
        return derived("step", self._task_name, self._call, name)

    def _decoded(self, kept: KeptStep) -> Any:
        try:
            return kept.value(self._app)
        except UndecodableError as error:
            raise IdempotentError(
                f"what step {kept.name!r} returned cannot be read: {error}; let the app accept that content type by result_accept_content"
            ) from error

    def _check_run(self, name: str) -> None:
        """Check that the body may take a step now."""

    def _kept(self, name: str) -> KeptStep | None:
        """Return the step, if it has returned before."""

    def _before(self) -> None:
        """Do what comes before a function is called."""

    def _keep(self, step: KeptStep) -> None:
        """Keep a step that has returned."""


class RowSteps(Steps):
    """The steps of a guarded run. They are in its row, if it has claimed it.

    In an atomic body they live as long as its transaction: what a function wrote there is undone with the run, so its step is, too. The
    commit ends the message, and with it the steps. So nothing is written for them.

    Args:
        run: The run, in its body.
        header: The message's header.
    """

    def __init__(self, run: ClaimedRow, header: Header) -> None:
        super().__init__(run.task.app, run.key.task_name, run.key.message_id)
        self._run = run
        self._header = header
        #: What the row keeps of this message; ``None`` until it is known.
        self._known: dict[str, KeptStep] | None = None
        #: The Celery id first sent under the message id.
        self._first = header.original_id

    def key(self, name: str) -> str:
        """Return the step's idempotency key; the same in every run of the message."""
        check_name(name)
        if self._run.claim is not None:
            self._read()
        return self._key(name)

    def _key(self, name: str) -> str:
        return derived("step", self._task_name, self._call, self._first, replacements(self._run.request), name)

    def _check_run(self, name: str) -> None:
        match self._run.state:
            case Claimed() | Unguarded():
                return
            case Lost(claim):
                raise LeaseLostError(claim.key.message_id, claim.token)
            case _:
                raise IdempotentError(
                    f"step {name!r} comes too late: the body has ended, or has handed its message on by retry() or replace()"
                )

    def _kept(self, name: str) -> KeptStep | None:
        return self._read().get(name)

    def _before(self) -> None:
        """Ask the store for the claim before a function is called, if its lease may have run out. Usually nothing is asked."""
        run, claim = self._run, self._run.claim
        if claim is None:
            return
        lease, now = run.task.idempotency.lease, time.monotonic()
        renewer = LeaseRenewer.of(run.queue_log)
        until = renewer.until(claim)
        if until is not None and (now < until or run.unit is not None):
            return
        if run.unit is not None:
            # The renewal has found out. Do not ask: on SQLite, this body's transaction may lock the question out.
            self._lose()
        if not run.write_end("keep the claim of", lambda: not run.queue_log.store.renew([run.held_claim], lease=lease)):
            self._lose()
        renewer.hold(run.held_claim, lease, asked=now)

    def _keep(self, step: KeptStep) -> None:
        run = self._run
        if run.claim is None or run.unit is not None:
            return
        steps = {**self._read(), step.name: step}
        lease, keeping = run.task.idempotency.lease, Keeping()

        def write(packed: bytes | None) -> bool:
            if packed is None:  # the store has refused it; still find out whether the claim holds
                return not run.queue_log.store.renew([run.held_claim], lease=lease)
            return run.queue_log.store.keep_steps(run.held_claim, steps=packed)

        packed = pack_steps(steps.values())

        def keep() -> None:
            if not run.write_end("keep a step of", lambda: keeping.write(packed, write)):
                self._lose()
            if keeping.refused:
                logger.error(
                    "%s: step %r is not kept, and would be called again by a rerun: let it return less", run, step.name
                )
            else:
                self._known = steps

        run.limits.put_off(keep)

    # -- the row -------------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, KeptStep]:
        """Return what the row keeps of this message. It is read once, if it was claimed before."""
        if self._known is None:
            claim = self._run.claim
            row = None if claim is None or claim.token == 1 else self._find()
            if claim is not None and row is not None:
                if (row.token, row.status) != (claim.token, Status.PROCESSING):
                    self._lose()
                # A message that was requeued under a new Celery id has the first one in its header.
                if row.task_id != self._header.task_id:
                    self._first = row.task_id
            self._known = {} if row is None else {step.name: step for step in self._of_this_message(row)}
        return self._known

    def _of_this_message(self, row: Row) -> list[KeptStep]:
        """Return the row's steps without those of an earlier message under the same id, or of what this one replaced."""
        try:
            steps = unpack_steps(row.steps)
        except UndecodableError as error:
            raise IdempotentError(f"{self._run}: {error}") from error
        return [step for step in steps if step.key == self._key(step.name)]

    def _find(self) -> Row | None:
        run = self._run
        unit = run.unit
        if unit is not None and unit.opened:
            return unit.store.find(run.key)

        def find() -> Row | None:
            return run.queue_log.store.find(run.key)

        try:
            return ask_until_answered(find, "read the steps of", run, silences=AWAY) if run.waits else find()
        except AWAY as error:
            if run.on_store_error != "run":
                raise
            logger.error("%s takes its steps again, since the store gives no answer: %s", run, error)
            return None

    def _lose(self) -> NoReturn:
        """Stop the body, since its claim is gone. What it makes of the error does not matter: see ``stop_if_lost``."""
        claim = self._run.held_claim
        self._run.move_to(Lost(claim))
        raise LeaseLostError(claim.key.message_id, claim.token)


def check_name(name: object) -> None:
    """Refuse a name that is no text.

    Raises:
        ConfigurationError: It is empty, or no text.
    """
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"the name of a step is a text that is not empty, not {name!r}")
