"""Schedulers that ask the queue log before they send a tick."""

from __future__ import annotations

import logging
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery import beat
from celery.beat import BeatLazyFunc, ScheduleEntry, Scheduler, SchedulingError
from celery.schedules import schedstate
from kombu.exceptions import OperationalError

from celery_idempotent.beat.due import Tick, tick_of
from celery_idempotent.beat.tick_log import Lapsed, SentBefore, TakenTick, TickCall, TickLog
from celery_idempotent.core.backoff import Backoff
from celery_idempotent.core.records import Row, Status
from celery_idempotent.errors import ConfigurationError, StoreError, StoreUnavailableError
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.producer.prepared import PreparedCall
from celery_idempotent.producer.recorded import republish
from celery_idempotent.producer.unrecorded import is_unrecorded
from celery_idempotent.queue_log import QueueLog

if TYPE_CHECKING:
    from celery.result import AsyncResult

__all__ = ["IdempotentScheduler", "PersistentScheduler"]

logger = logging.getLogger("celery_idempotent")

#: Seconds after which a beat asks again a store that does not answer, or tries again to send a tick.
_SOON = 1.0

#: Seconds that are added to a wait, as Celery takes 0.01 off.
_A_LITTLE = 0.02

#: Seconds between two lines in the log about the same outage.
_COMPLAIN_EVERY = 30.0

#: Errors after which another attempt may succeed: the broker, or the store of a guarded task, is away.
_PASSING = (OperationalError, StoreError, OSError, EOFError)

#: A tick that is sent without asking, since the store does not answer and ``idempotent_on_store_error`` is ``"run"``.
_UNGUARDED = object()


class IdempotentScheduler(Scheduler):  # type: ignore[misc]
    """A mixin for schedulers of ``celery beat``: one message for each tick of an entry, however many beats run.

    Put it first among the bases of your own scheduler::

        class MyScheduler(IdempotentScheduler, their.Scheduler): ...

    A beat takes a tick in the queue log before it sends the message. If another beat has taken it, it sends nothing. Tasks need not be
    guarded: the queue log of the app is used for entries of any task.

    Hazard:
        A beat that dies after it has published a message and before the log says so leaves the tick to another beat, which publishes the
        message again under the same Celery id. A guarded task absorbs the copy. A plain task runs twice.
    """

    #: Seconds after which another beat sends a tick that a beat has taken and not sent. A beat that is stopped for longer between the
    #: two may send a message twice.
    tick_lease: float = 30.0

    #: Seconds between two looks at the queue log for such ticks; beat wakes up as often.
    look_every: float = 10.0

    _look_at = 0.0
    _failures = 0
    _complained: float | None = None

    @cached_property
    def queue_log(self) -> QueueLog:
        """The app's queue log."""
        return QueueLog.of(self.app)

    @cached_property
    def _ticks(self) -> TickLog:
        return TickLog(self.queue_log, lease=self.tick_lease)

    @cached_property
    def _asked(self) -> dict[str, Any]:
        """The answers for entries that are about to be sent, by name."""
        return {}

    @cached_property
    def _not_ended(self) -> list[TakenTick]:
        """Ticks that were sent, which the store did not take down yet."""
        return []

    def setup_schedule(self) -> None:
        """Read the schedule; see Celery.

        Raises:
            ConfigurationError: A setting of the queue log is wrong.
        """
        _ = self.queue_log.settings
        super().setup_schedule()

    # -- what Celery calls ---------------------------------------------------------------------------------------------

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Send what is due, and before that the ticks that other beats have left; see Celery.

        Returns:
            Seconds after which to call it again.
        """
        wait = self._tend()
        return float(min(super().tick(*args, **kwargs), wait))

    def is_due(self, entry: ScheduleEntry) -> Any:
        """Return whether an entry is to be sent now, and when to ask again; see Celery.

        While the store does not answer, an entry that is due is not sent and stays due.
        """
        state = super().is_due(entry)
        if not state[0] or not self._is_guarded(entry):
            return state
        try:
            answer = self._take(entry)
        except (StoreError, SchedulingError) as error:
            self._complain("beat's entry %r is due and waits: %s", entry.name, error)
            return schedstate(is_due=False, next=_SOON)
        if isinstance(answer, SentBefore) and answer.new_in is not None:
            return schedstate(is_due=False, next=answer.new_in + _A_LITTLE)
        self._asked[entry.name] = answer
        return state

    def apply_async(
        self, entry: ScheduleEntry, producer: Any = None, advance: bool = True, **kwargs: Any
    ) -> AsyncResult[Any] | None:
        """Send an entry's message, unless another beat has sent this tick; see Celery.

        Returns:
            The message's AsyncResult; ``None`` if nothing was sent.

        Raises:
            SchedulingError: The message could not be sent, or the store did not answer.
        """
        if not self._is_guarded(entry):
            return super().apply_async(entry, producer=producer, advance=advance, **kwargs)
        answer = self._asked.pop(entry.name, None)
        if answer is None or (isinstance(answer, TakenTick) and self._is_late(answer)):
            try:
                answer = self._take(entry)
            except StoreError as error:
                raise SchedulingError(f"Couldn't apply scheduled task {entry.name}: {error}") from error
        if advance:
            self.reserve(entry)
        if answer is _UNGUARDED:
            return super().apply_async(entry, producer=producer, advance=False, **kwargs)
        if isinstance(answer, SentBefore):
            logger.info(
                "beat's entry %r is not sent: %s was taken by %s", entry.name, answer.row.key, answer.row.worker
            )
            return None
        return self._send(entry, answer, producer, **kwargs)

    # -- a tick --------------------------------------------------------------------------------------------------------

    def tick_of(self, entry: ScheduleEntry) -> Tick:
        """Return the tick of an entry that is due. Override it for a schedule whose class only you know.

        Beats that mean the same tick must return ticks of the same name.
        """
        return tick_of(entry, retention=self.queue_log.settings.retention)

    def _is_guarded(self, entry: ScheduleEntry) -> bool:
        if not self.queue_log.settings.enabled:
            return False
        task = self.app.tasks.get(entry.task)
        try:
            return not (is_guarded(task) and is_unrecorded(task))
        except ConfigurationError:
            return True  # sending it raises the same, and that is logged

    def _is_late(self, taken: TakenTick) -> bool:
        """Return whether so much of the lease has passed that another beat may soon send the tick."""
        return time.monotonic() - taken.taken > self.tick_lease / 2

    def _take(self, entry: ScheduleEntry) -> Any:
        """Take the tick of an entry that is due, after any that was left of it.

        Raises:
            StoreError: The store did not answer.
            SchedulingError: A tick that was left could not be sent.
        """
        _ = self.producer  # connects, which may take longer than a lease
        call = TickCall(
            entry.name,
            entry.task,
            [_value(argument) for argument in entry.args or ()],
            {name: _value(argument) for name, argument in (entry.kwargs or {}).items()},
            dict(entry.options or {}),
        )
        try:
            answer = self._ticks.take(self.tick_of(entry), call)
            if isinstance(answer, Lapsed):
                self._send_left(answer.row)
                answer = self._ticks.take(self.tick_of(entry), call)
        except StoreUnavailableError as error:
            if self.queue_log.settings.on_store_error != "run":
                raise
            logger.error("beat's entry %r is sent unguarded, the store gives no answer: %s", entry.name, error)
            return _UNGUARDED
        return SentBefore(answer.row) if isinstance(answer, Lapsed) else answer

    def _send(self, entry: ScheduleEntry, taken: TakenTick, producer: Any, **kwargs: Any) -> AsyncResult[Any] | None:
        call = taken.call
        options = {"task_id": taken.task_id, **call.options}
        options["headers"] = dict(options.get("headers") or {})  # Celery adds to it
        task = self.app.tasks.get(call.task)
        result = None
        try:
            if not (taken.again and is_guarded(task) and self._was_recorded(task, call, options)):
                # Not `copy.copy`, which makes an entry anew by `__reduce__`, and a model's cannot be made so.
                ready = object.__new__(type(entry))
                given = {"task": call.task, "args": call.args, "kwargs": call.kwargs, "options": options}
                ready.__dict__.update(entry.__dict__, **given)
                result = super().apply_async(ready, producer=producer, advance=False, **kwargs)
        except Exception as error:
            self._note_unsent(taken, error)
            raise
        taken.sent = time.monotonic()
        self._end(taken)
        return result

    def _was_recorded(self, task: Any, call: TickCall, options: dict[str, Any]) -> bool:
        """Return whether a guarded task's message has its row from an earlier attempt. Publish it if nobody has claimed it."""
        rest = {name: value for name, value in options.items() if name != "task_id"}
        key = PreparedCall.of(task, call.args, call.kwargs, options["task_id"], rest).message.key
        row = self.queue_log.store.find(key)
        if row is None or row.task_id != options["task_id"]:
            return False
        if row.status is Status.PENDING and row.worker is None:
            republish(self.queue_log, row)
        return True

    def _note_unsent(self, taken: TakenTick, error: BaseException) -> None:
        cause = error.__context__ if isinstance(error, SchedulingError) and error.__context__ is not None else error
        try:
            if isinstance(cause, _PASSING):
                self._ticks.give_back(taken)
                self._look_again()
            else:
                self._ticks.fail(taken, cause)
        except StoreError as silence:
            logger.warning("%s was not sent, and waits for its lease to run out: %s", taken.claim.key, silence)

    def _end(self, taken: TakenTick) -> None:
        try:
            self._ticks.end(taken)
        except StoreError as error:
            self._complain("%s was sent, and the store does not take that down: %s", taken.claim.key, error)
            self._not_ended.append(taken)
            self._look_again()

    # -- ticks that were left ------------------------------------------------------------------------------------------

    def _tend(self) -> float:
        """End and send what was left, if it is time for that; return the seconds until it is again."""
        if not self.queue_log.settings.enabled:
            return float(self.max_interval)
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + self.look_every
            try:
                for taken in list(self._not_ended):
                    self._ticks.end(taken)
                    self._not_ended.remove(taken)
                for row in self._ticks.lapsed():
                    self._send_left(row)
            except (StoreError, SchedulingError) as error:
                self._complain("beat could not look for ticks that were left: %s", error)
                self._look_again()
            else:
                self._failures, self._complained = 0, None
        return max(self._look_at - time.monotonic(), 0.0)

    def _look_again(self) -> None:
        self._failures += 1
        pause = Backoff(_SOON, longest=max(self.look_every, _SOON)).pause(self._failures)
        self._look_at = min(self._look_at, time.monotonic() + pause)

    def _send_left(self, row: Row) -> None:
        producer = self.producer
        taken = self._ticks.take_over(row)
        if taken is None:
            return
        call = taken.call
        logger.warning(
            "beat's entry %r is sent from the queue log: %s was not sent by %s", call.entry, row.key, row.worker
        )
        entry = ScheduleEntry(name=call.entry, task=call.task, app=self.app)
        try:
            self._send(entry, taken, producer)
        except SchedulingError as error:
            if isinstance(error.__context__, _PASSING):
                raise
            logger.error("%s", error)

    def _complain(self, text: str, *about: object) -> None:
        now = time.monotonic()
        if self._complained is None or now - self._complained >= _COMPLAIN_EVERY:
            self._complained = now
            logger.error(text, *about)


class PersistentScheduler(IdempotentScheduler, beat.PersistentScheduler):  # type: ignore[misc]
    """Celery's own scheduler, with one message for each tick; see :class:`IdempotentScheduler`.

    It keeps its times in a file (``beat_schedule_filename``). Two beats need two files, and may be on two hosts.
    """


def _value(argument: Any) -> Any:
    return argument() if isinstance(argument, BeatLazyFunc) else argument
