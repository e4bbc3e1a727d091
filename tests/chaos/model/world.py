"""Producers, workers and recovery around one store, in one thread: the production code between two points of interruption.

What is real: ``send`` through ``apply_async``, ``admit``, ``Run``, ``Task.retry``, ``Recovery``, and both decisions within them.
What is mirrored, because it is Celery's: the order in which a traced task sends its callbacks, stores its result and is
acknowledged (``celery.app.trace``), and what a worker's main process writes for a child that it lost
(:class:`celery_idempotent.worker.request.IdempotentRequest`). Renewal is a thread that keeps up, or does not: see :meth:`World.pass_time`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from itertools import count
from typing import Any, cast

from celery import Celery, states
from celery._state import _task_stack
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from kombu.exceptions import OperationalError

from celery_idempotent import IdempotentTask, MessageMismatchError, QueueLog
from celery_idempotent.core.decision import AVAILABLE_GRACE, MAX_TAKEOVERS
from celery_idempotent.core.records import (
    ABANDONED,
    Claim,
    Holder,
    MessageKey,
    NotClaimed,
    Owner,
    ProcessedStatus,
    Row,
    Status,
)
from celery_idempotent.core.store import Store
from celery_idempotent.errors import AlreadyFailedError
from celery_idempotent.maintenance.recovery import Recovery
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.identity import identity_of
from celery_idempotent.worker.admission import admit
from celery_idempotent.worker.delivery import worker_label
from celery_idempotent.worker.lease_renewal import LeaseRenewer
from celery_idempotent.worker.perform import perform
from celery_idempotent.worker.run import Run
from celery_idempotent.worker.run_state import Checkpointed, Claimed
from celery_idempotent.worker.signals import _after_run, _revoked, _succeeded
from tests.chaos.model.broker import Broker, Copy, Mood
from tests.chaos.model.clock import Clock
from tests.chaos.model.invariants import BrokenInvariantError, VerbCall, starts_anew
from tests.chaos.model.observed_store import ObservedStore

__all__ = ["RETENTION", "Execution", "Interruption", "KilledError", "Outcome", "World", "build_app"]

LOST_AFTER = 300
RETENTION = 7 * 86400

#: Ids are not used twice in a process: the result backend is shared by all worlds.
_serial = count(1)


class KilledError(BaseException):
    """The process is gone: nothing more of what it does reaches anybody."""


class BoomError(Exception):
    """A body's own error."""


class Outcome(StrEnum):
    """How a body ends."""

    RETURN = "return"
    RAISE = "raise"
    RETRY = "retry"
    RETRY_LATER = "retry later"
    REQUEUE = "requeue"
    REJECT = "reject"
    IGNORE = "ignore"


class Phase(Enum):
    """How far an execution has come."""

    BODY = auto()
    SENDING = auto()  # the body has returned; callbacks and result are to be sent


class Strike(StrEnum):
    """What comes between two steps of somebody."""

    KILL = "kill"  # its process dies
    LIMIT = "limit"  # the soft time limit strikes in it
    LAPSE = "lapse"  # every lease runs out
    WAKE = "wake"  # workers that had stalled renew
    DELIVER = "deliver"  # a copy is delivered elsewhere
    FINISH = "finish"  # another execution ends
    RECOVER = "recover"  # another worker recovers


@dataclass
class Interruption:
    """What comes between, and before how many-th point of interruption: each verb has one before it, and one after."""

    at: int
    strike: Strike


@dataclass(eq=False)
class Execution:
    """A delivery that a worker executes.

    Attributes:
        copy: What was delivered.
        request: Celery's.
        run: What it was admitted as.
        stalled: Whether its process stands still: nobody renews its lease.
    """

    copy: Copy
    request: Context
    run: Run
    phase: Phase = Phase.BODY
    stalled: bool = False

    @property
    def task(self) -> IdempotentTask:
        return self.copy.task

    @property
    def owner(self) -> Owner:
        """As its worker's main process knows it."""
        return Owner(self.run.key, worker_label(self.request.hostname))

    @property
    def runs_body(self) -> bool:
        return isinstance(self.run.state, Claimed)

    def __str__(self) -> str:
        return f"{self.request.hostname} with {self.copy}, {type(self.run.state).__name__}{', stalled' if self.stalled else ''}"


@dataclass
class Arrival:
    """A copy that a worker decides on.

    Attributes:
        copy: What was delivered.
        taken: The row that stood in its way when it was last asked for.
    """

    copy: Copy
    taken: Row | None = None

    def may_claim(self, row: Row) -> bool:
        """Return whether it is no older than what a pending row waits for, or the retry's own message had its time to come first."""
        if self.copy.retries >= row.attempt:
            return True
        taken = self.taken
        return taken is not None and taken.attempt == row.attempt and taken.available_in <= -AVAILABLE_GRACE


@dataclass
class Life:
    """One life of a message id, until it is free again: what is known of it besides its row.

    Attributes:
        begun: How often its body was begun.
        succeeded: Whether a success of its body was recorded.
        promised: Whether a caller was told that it was sent.
        cancelled: Whether it was revoked before it ran, or again.
    """

    begun: int = 0
    succeeded: bool = False
    promised: bool = False
    cancelled: bool = False


@dataclass
class Known:
    """What the model knows of an id.

    Attributes:
        life: Of the message that has it now.
        tokens: Every token that was given to somebody.
        copies: How many deliveries and calls there were, each of which may be counted as one duplicate.
    """

    life: Life = field(default_factory=Life)
    tokens: set[int] = field(default_factory=set)
    copies: int = 0


class _Renewals:
    """What runs keep alive; the world renews it."""

    def __init__(self) -> None:
        self.held: dict[Holder, float] = {}

    def hold(self, holder: Holder, lease: float, *, asked: float | None = None) -> None:
        self.held[holder] = lease

    def let_go(self, holder: Holder) -> None:
        self.held.pop(holder, None)


class _ModelTask(IdempotentTask):
    """A task whose messages go to the model's broker."""

    abstract = True
    max_retries = None

    def publish(self, args: Any, kwargs: Any, **options: Any) -> Any:
        world: World = self.app.world
        world.gate()
        world.broker.publish(self, args, options, world.clock.now)
        world.gate()
        return self.AsyncResult(options["task_id"])


def build_app() -> Celery:
    """Return an app with the tasks of the model; each world brings its store."""
    app = Celery("model", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.idempotent_lost_after = LOST_AFTER
    app.conf.idempotent_retention = RETENTION

    def body(number: int, amount: int = 1) -> None:
        raise AssertionError("the model runs bodies itself")

    common = {"base": _ModelTask, "shared": False, "message_id": "m{number}"}
    app.task(body, name="late", acks_late=True, **common)
    app.task(body, name="early", on_abandoned="fail", resubmit_failed=True, **common)
    app.task(body, name="brief", acks_late=True, unique_for=50, resubmit_failed=True, keep_result=False, **common)
    app.finalize()
    return app


class World:
    """Everything that happens to one queue log.

    Args:
        app: The app, which belongs to this world until the next.
        store: An empty store, whose clock is ``clock``.
        clock: The model's time.
    """

    def __init__(self, app: Celery, store: Store, clock: Clock) -> None:
        self.app, self.clock = app, clock
        self.broker = Broker()
        self.executions: list[Execution] = []
        self.known: dict[MessageKey, Known] = defaultdict(Known)
        self.watched = ObservedStore(store, self.gate, self._saw)
        self.queue_log = QueueLog(app, self.watched.as_store())
        self.renewals = _Renewals()
        renewed = self.queue_log.part(LeaseRenewer, lambda: cast("LeaseRenewer", self.renewals))
        assert renewed is cast("Any", self.renewals), "the world renews, and nobody else"
        app.world = self
        #: What is being decided on, the one that came between the others last.
        self._arrivals: list[Arrival] = []
        self._interruption: Interruption | None = None
        self._killed = False

    # -- interruption --------------------------------------------------------------------------------------------------

    @contextmanager
    def interrupted(self, by: Interruption | None) -> Iterator[None]:
        """Somebody's act, in which something comes between."""
        self._interruption = by
        try:
            yield
        finally:
            self._interruption, self._killed = None, False

    def gate(self) -> None:
        """Mark a point at which the actor may be interrupted."""
        if self._killed:
            raise KilledError
        if self._interruption is None:
            return
        self._interruption.at -= 1
        if self._interruption.at > 0:
            return
        strike, self._interruption = self._interruption.strike, None
        # The broker's mood is for who is interrupted: a hold would wait for a better one, in real time.
        mood, self.broker.mood = self.broker.mood, Mood.WELL
        self._strike(strike)
        self.broker.mood = mood

    def _strike(self, strike: Strike) -> None:
        match strike:
            case Strike.KILL:
                self._killed = True
                raise KilledError
            case Strike.LIMIT:
                raise SoftTimeLimitExceeded
            case Strike.LAPSE:
                self.clock.now += 61
            case Strike.WAKE:
                self.wake()
            case Strike.DELIVER:
                for copy in self.broker.due(self.clock.now)[:1]:
                    self.deliver(copy)
            case Strike.FINISH:
                # Not the one that is interrupted, which is the last to have been looked at.
                for execution in [one for one in self.executions if one is not self._acting][:1]:
                    self.finish(execution, Outcome.RETURN)
            case Strike.RECOVER:
                Recovery(self.queue_log).run_pass()

    _acting: Execution | None = None
    #: The Celery id of a delivery that is being discarded.
    _revoking: str | None = None

    # -- producers -----------------------------------------------------------------------------------------------------

    def send(self, task: str, number: int, amount: int, *, mood: Mood, **options: Any) -> None:
        """Call ``apply_async``."""
        key = MessageKey(f"m{number}", task)
        self.broker.mood = mood
        self.known[key].copies += 1
        try:
            result = self.app.tasks[task].apply_async((number, amount), task_id=f"t{next(_serial)}", **options)
        except OperationalError:
            assert mood is not Mood.WELL, "a publication failed that did not"
        except MessageMismatchError:
            pass
        except KilledError:
            pass
        else:
            if not result.duplicate:
                self.known[key].life.promised = True
        finally:
            self.broker.mood = Mood.WELL

    def send_foreign(self, task: str, number: int) -> None:
        """Send a message from a producer without this library, which records none."""
        self.broker.add(Copy(self.app.tasks[task], f"t{next(_serial)}", f"m{number}", [number]))

    # -- workers -------------------------------------------------------------------------------------------------------

    def deliver(self, copy: Copy) -> Execution | None:
        """Give a worker a copy; return the execution that it begins, if it does."""
        self.broker.deliver(copy)
        task, request = copy.task, copy.request(f"w{next(_serial)}")
        self.known[MessageKey(copy.message_id, task.name)].copies += 1
        if not task.acks_late:
            self.broker.ack(copy)
        Rescue.of(self.queue_log).saw("celery", identity_of(task, request).key)
        self._arrivals.append(Arrival(copy))
        try:
            with self._traced(task, request):
                run = admit(task, request)
        except Ignore:
            self._after_run(task, request, states.IGNORED)
            self._ack(copy)
            return None
        except (AlreadyFailedError, MessageMismatchError) as error:
            task.backend.store_result(request.id, error, states.FAILURE, request=request)
            self._after_run(task, request, states.FAILURE, error)
            self._ack(copy)
            return None
        except KilledError:
            return None
        finally:
            self._arrivals.pop()
        execution = Execution(copy, request, run)
        self.executions.append(execution)
        if execution.runs_body:
            life = self.known[run.key].life
            _law("the body of a message that succeeded does not run again", not life.succeeded, execution)
            life.begun += 1
        return execution

    def finish(self, execution: Execution, outcome: Outcome, *, send: bool = True) -> None:
        """End the body, write its outcome, and send what follows."""
        if execution.phase is Phase.SENDING:
            self.send_result(execution)
            return
        task, request = execution.task, execution.request
        self._acting = execution
        began = execution.runs_body
        body = _bodies(task)[outcome]

        def run_body() -> Any:
            _law("what is replayed does not run", began, execution)
            return body()

        try:
            with self._traced(task, request):
                perform(execution.run, run_body)
        except Retry as retry:
            task.backend.store_result(request.id, retry, states.RETRY, request=request)
            self._after_run(task, request, states.RETRY)
            self._end(execution)
        except Ignore:
            self._after_run(task, request, states.IGNORED)
            self._end(execution)
        except Reject as reject:
            self._after_run(task, request, states.REJECTED)
            self._end(execution, ack=not reject.requeue)
        except (BoomError, SoftTimeLimitExceeded) as error:
            task.backend.store_result(request.id, error, states.FAILURE, request=request)
            self._after_run(task, request, states.FAILURE, error)
            self._end(execution)
        except KilledError:
            self.lose(execution)
        else:
            execution.phase = Phase.SENDING
            if send:
                self.send_result(execution)
        finally:
            self._acting = None

    def send_result(self, execution: Execution) -> None:
        """Callbacks, then the result, then what completes a recovery point, then the acknowledgement: Celery's order."""
        task, request = execution.task, execution.request
        self._acting = execution
        try:
            self.gate()  # the callbacks
            self.gate()
            task.backend.store_result(request.id, 1, states.SUCCESS, request=request)
            self.gate()
            with self._traced(task, request):
                _succeeded(task)
        except SoftTimeLimitExceeded as error:
            # Celery reports it as the task's failure; a recovery point stays.
            task.backend.store_result(request.id, error, states.FAILURE, request=request)
            self._after_run(task, request, states.FAILURE, error)
            self._end(execution)
        except KilledError:
            self.lose(execution)
        else:
            self._after_run(task, request, states.SUCCESS)
            self._end(execution)
        finally:
            self._acting = None

    def lose(self, execution: Execution, *, told: bool = False) -> None:
        """Let a process die with its execution; its copy stays with the broker, unless that was acknowledged before.

        Args:
            execution: What dies.
            told: Whether its worker's main process lives, and ends the claim.
        """
        self._end(execution, ack=None)
        if told:
            task, store = execution.task, self.queue_log.store
            if task.idempotency.delivery.on_abandoned == "rerun":
                store.expire(execution.owner)
            else:
                store.fail(execution.owner, error=ABANDONED, unique_for=task.idempotency.unique_for)

    def revoke(self, copy: Copy) -> None:
        """Drop a copy that was revoked, without running it."""
        self.broker.deliver(copy)
        request = copy.request("revoker")
        self._revoking = copy.task_id
        try:
            _revoked(copy.task, request)
        finally:
            self._revoking = None
        self.broker.ack(copy)

    def _end(self, execution: Execution, *, ack: bool | None = True) -> None:
        """End an execution: its copy is acknowledged, given back, or (``None``) left as it is."""
        if execution not in self.executions:
            return
        self.executions.remove(execution)
        execution.run.detach()
        if ack:
            self._ack(execution.copy)
        elif ack is not None:
            self.broker.restore(execution.copy)

    def _ack(self, copy: Copy) -> None:
        if not self._killed:  # after its run
            self.broker.ack(copy)

    def _after_run(
        self, task: IdempotentTask, request: Context, state: str, error: BaseException | None = None
    ) -> None:
        """Do what the package does after every run. A process that dies in it dies before its acknowledgement."""
        with suppress(KilledError, SoftTimeLimitExceeded), self._traced(task, request):
            _after_run(task, state=state, retval=error)

    @contextmanager
    def _traced(self, task: IdempotentTask, request: Context) -> Iterator[None]:
        _task_stack.push(task)
        task.request_stack.push(request)
        try:
            yield
        finally:
            task.request_stack.pop()
            _task_stack.pop()

    # -- time ----------------------------------------------------------------------------------------------------------

    def pass_time(self, seconds: int) -> None:
        """Time goes by. Whoever has not stalled has renewed its lease all along; nothing stalls for as long as rows are kept.

        That is a condition of the library: a row that is purged takes its token along.
        """
        self.clock.now += seconds
        if seconds >= RETENTION:
            for execution in [one for one in self.executions if one.stalled]:
                self.lose(execution)
        self._renew(lambda execution: not execution.stalled)

    def wake(self) -> None:
        """Workers that stood still go on."""
        self._renew(lambda execution: execution.stalled)
        for execution in self.executions:
            execution.stalled = False

    def _renew(self, of: Callable[[Execution], bool]) -> None:
        claims = [one.run.claim for one in self.executions if of(one) and one.run.claim in self.renewals.held]
        for claim in claims:
            if claim is not None:
                lease = self.renewals.held[claim]
                for lost in self.queue_log.store.renew([claim], lease=lease):
                    self.renewals.let_go(lost)

    # -- what the model holds --------------------------------------------------------------------------------------------

    def _saw(self, act: VerbCall, before: Row | None, after: Row | None) -> None:
        """Keep in mind what a verb has changed."""
        key = (after or before or act).key if (after or before) else None  # type: ignore[union-attr]
        if key is None:
            return
        known = self.known[key]
        if before is None or after is None or starts_anew(before, after):
            if act.verb == "withdraw":
                _law("what a caller was told was sent is not withdrawn", not known.life.promised, act)
            known.life = Life()
        if after is None:
            known.tokens.clear()
            return
        if act.verb == "claim" and key in act.keys:
            self._saw_claim(act, before)
        life = known.life
        if after.processed_status is ProcessedStatus.SUCCESS:
            life.succeeded = True
        if act.verb in ("cancel", "withdraw") and after.status is Status.DONE:
            life.cancelled = True
        if (before is not None and after.token > before.token) or (before is None and after.token):
            _law("a token is given once", after.token not in known.tokens, act)
            known.tokens.add(after.token)
        if act.verb == "abandon" and before is not None and before.status is not after.status:
            task = self.app.tasks[key.task_name]
            fails = task.idempotency.delivery.on_abandoned == "fail" and before.processed_status is None
            revoked = before.forbidden or (before.task_id == self._revoking and before.processed_status is None)
            _law("a message is abandoned by rule", fails or revoked or before.takeovers >= MAX_TAKEOVERS, act)
            life.cancelled = life.cancelled or revoked
        _law("no more duplicates are counted than there are copies", after.duplicates <= known.copies, act)

    def _saw_claim(self, act: VerbCall, before: Row | None) -> None:
        arrival = self._arrivals[-1]
        if isinstance(act.answer, NotClaimed):
            arrival.taken = act.answer.row
        elif before is not None and before.status is Status.PENDING:
            _law("an old copy does not run in its retry's place", arrival.may_claim(before), act)

    def check(self) -> None:
        """Check the invariants between any two actions."""
        owners: dict[Claim, Execution] = {}
        for execution in self.executions:
            claim = execution.run.claim
            if claim is None or not isinstance(execution.run.state, (Checkpointed, Claimed)):
                continue
            row = self.watched.rows.get(claim.key)
            if row is not None and row.status is Status.PROCESSING and row.token == claim.token:
                _law("a claim has one owner", claim not in owners, execution)
                owners[claim] = execution

    def come_to_rest(self, *, poison: bool) -> None:
        """Let everything go on that can, and time with it: every message ends, within a few rounds of recovery.

        Workers that stalled never come back.

        Args:
            poison: Whether a body that begins from now on kills its process; otherwise it succeeds.
        """
        for execution in list(self.executions):
            if execution.stalled:
                self.lose(execution)
            else:
                self.finish(execution, Outcome.RETURN)
        pause = float(LOST_AFTER)
        for _ in range(_ROUNDS):
            for copy in list(self.broker.unacked.values()):
                self.broker.restore(copy)
            self.pass_time(round(pause))
            pause *= _LONGER
            Recovery(self.queue_log).run_pass()
            Rescue.of(self.queue_log).publish_waiting(LOST_AFTER / 2)
            self._deliver_all(poison=poison)
            at_rest = all(row.status is Status.DONE for row in self.watched.rows.values())
            if at_rest and not self.broker.ready and not self.broker.unacked:
                break
        else:
            left = [str(row) for row in self.watched.rows.values() if row.status is not Status.DONE]
            raise BrokenInvariantError(
                f"every message has a way forward; left after {_ROUNDS} rounds: {left or 'copies'}"
            )
        for key, known in self.known.items():
            if known.life.promised:
                _law("what was sent has run", bool(known.life.begun or known.life.cancelled), key)

    def _deliver_all(self, *, poison: bool) -> None:
        for _ in range(_DELIVERIES):
            due = self.broker.due(self.clock.now)
            if not due:
                return
            execution = self.deliver(due[0])
            if execution is not None and poison and execution.runs_body:
                self.lose(execution)
            elif execution is not None:
                self.finish(execution, Outcome.RETURN)
        raise BrokenInvariantError("copies are delivered again and again, at once")


#: Rounds in which everything comes to rest, each longer than the one before: more than one attempt may lose owners.
_ROUNDS = 16
_LONGER = 1.5
_DELIVERIES = 300


def _bodies(task: IdempotentTask) -> dict[Outcome, Callable[[], Any]]:
    def raising(error: BaseException) -> Callable[[], Any]:
        def body() -> Any:
            raise error

        return body

    return {
        Outcome.RETURN: lambda: 1,
        Outcome.RAISE: raising(BoomError("no")),
        Outcome.RETRY: lambda: task.retry(countdown=0),
        Outcome.RETRY_LATER: lambda: task.retry(countdown=90),
        Outcome.REQUEUE: raising(Reject("again", requeue=True)),
        Outcome.REJECT: raising(Reject("never")),
        Outcome.IGNORE: raising(Ignore("nothing to do")),
    }


def _law(name: str, holds: bool, by: object) -> None:
    if not holds:
        raise BrokenInvariantError(f"{name}\n  by {by}")
