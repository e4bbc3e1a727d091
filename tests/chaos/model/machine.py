"""The model as a state machine: its rules are all that may happen, in any order."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from celery import Celery
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kombu.exceptions import OperationalError

from celery_idempotent.maintenance.recovery import Recovery
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.stores.sql import SQLStore
from tests.chaos.model.broker import Copy, Mood
from tests.chaos.model.clock import Clock
from tests.chaos.model.world import RETENTION, Execution, Interruption, KilledError, Outcome, Strike, World

__all__ = ["Model"]

#: Tasks and numbers that an example is about: few, so that much happens to each message.
_MESSAGES = st.lists(
    st.tuples(st.sampled_from(["late", "early", "brief"]), st.sampled_from([1, 2])), min_size=1, max_size=2, unique=True
)
#: Which of those there are, counted round.
_WHICH = st.integers(0, 5)
_WELL_MOSTLY = st.sampled_from([Mood.WELL] * 6 + [Mood.DOWN, Mood.MUTE])
_RARELY = st.sampled_from([False] * 7 + [True])


def _interruptions(*strikes: Strike) -> st.SearchStrategy[Interruption | None]:
    return st.none() | st.builds(Interruption, at=st.integers(1, 8), strike=st.sampled_from(strikes))


_OF_A_PRODUCER = _interruptions(Strike.KILL, Strike.DELIVER)
_OF_A_WORKER = _interruptions(Strike.KILL, Strike.LAPSE, Strike.WAKE, Strike.DELIVER, Strike.FINISH, Strike.RECOVER)
_OF_A_BODY = _interruptions(Strike.KILL, Strike.LIMIT, Strike.LAPSE, Strike.DELIVER, Strike.RECOVER)

_ENDS: dict[str, Any] = {
    "outcome": st.sampled_from([Outcome.RETURN] * 4 + list(Outcome)),
    "mood": _WELL_MOSTLY,
    "send": st.booleans(),
    "by": _OF_A_BODY,
}


class Model(RuleBasedStateMachine):
    """Anything that may happen to messages.

    Args:
        app: See :func:`~tests.chaos.model.world.build_app`.
        store: The store; its rows are deleted first.
        clock: The store's clock.
    """

    def __init__(self, app: Celery, store: SQLStore, clock: Clock) -> None:
        super().__init__()
        clock.now = 0
        with store.engine.begin() as connection:
            connection.execute(sa.delete(store._table))
        self.world = World(app, store, clock)
        self.messages: list[tuple[str, int]] = []
        self.poison = False

    @initialize(messages=_MESSAGES, poison=st.sampled_from([False] * 3 + [True]))
    def begin(self, messages: list[tuple[str, int]], poison: bool) -> None:
        self.messages, self.poison = messages, poison

    # -- producers -----------------------------------------------------------------------------------------------------

    @rule(
        which=_WHICH,
        elsewhere=_RARELY,
        amount=st.sampled_from([1, 1, 1, 1, 2]),
        link=st.booleans(),
        ignore_result=_RARELY,
        countdown=st.sampled_from([None, None, None, 45]),
        mood=_WELL_MOSTLY,
        by=_OF_A_PRODUCER,
    )
    def call(
        self,
        which: int,
        elsewhere: bool,
        amount: int,
        link: bool,
        ignore_result: bool,
        countdown: float | None,
        mood: Mood,
        by: Interruption | None,
    ) -> None:
        message = self.messages[which % len(self.messages)]
        if elsewhere:
            self.world.send_foreign(*message)
            return
        options: dict[str, Any] = {"countdown": countdown, "ignore_result": ignore_result}
        if link:
            options["link"] = self.world.app.signature("after", immutable=True)
        with self.world.interrupted(by):
            self.world.send(*message, amount, mood=mood, **options)

    # -- the broker ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.broker.ready)
    @rule(which=_WHICH, lost=st.booleans())
    def duplicate_or_lose(self, which: int, lost: bool) -> None:
        ready = self.world.broker.ready
        copy = ready[which % len(ready)]
        if lost:
            ready.remove(copy)
        else:
            self.world.broker.add(copy)

    @precondition(lambda self: self.world.broker.unacked)
    @rule(which=_WHICH)
    def deliver_again(self, which: int) -> None:
        unacked = list(self.world.broker.unacked.values())
        self.world.broker.restore(unacked[which % len(unacked)])

    # -- workers -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self._due)
    @rule(which=_WHICH, by=_OF_A_WORKER, revoked=_RARELY)
    def deliver(self, which: int, by: Interruption | None, revoked: bool) -> None:
        copy = self._due[which % len(self._due)]
        if revoked:
            self.world.revoke(copy)
            return
        with self.world.interrupted(by):
            self.world.deliver(copy)

    @precondition(lambda self: self._due)
    @rule(which=_WHICH, **_ENDS)
    def deliver_and_finish(self, which: int, outcome: Outcome, mood: Mood, send: bool, by: Interruption | None) -> None:
        execution = self.world.deliver(self._due[which % len(self._due)])
        if execution is not None:
            self._finish(execution, outcome, mood, send, by)

    @precondition(lambda self: self._due)
    @rule(which=_WHICH, ended=st.booleans(), told=st.booleans(), again=st.booleans())
    def deliver_and_lose(self, which: int, ended: bool, told: bool, again: bool) -> None:
        execution = self.world.deliver(self._due[which % len(self._due)])
        if execution is not None and ended:
            # After the body and before its callbacks; its whole worker dies too.
            self.world.finish(execution, Outcome.RETURN, send=False)
            told = False
        if execution in self.world.executions and execution is not None:
            self._lose(execution, told, again)

    @precondition(lambda self: self.world.executions)
    @rule(which=_WHICH, **_ENDS)
    def finish(self, which: int, outcome: Outcome, mood: Mood, send: bool, by: Interruption | None) -> None:
        self._finish(self._execution(which), outcome, mood, send, by)

    @precondition(lambda self: self.world.executions)
    @rule(which=_WHICH, told=st.booleans(), again=st.booleans())
    def lose(self, which: int, told: bool, again: bool) -> None:
        self._lose(self._execution(which), told, again)

    @precondition(lambda self: self.world.executions)
    @rule(which=_WHICH)
    def stall(self, which: int) -> None:
        self._execution(which).stalled = True

    @precondition(lambda self: self.world.executions)
    @rule(which=_WHICH, again=st.booleans(), **_ENDS)
    def outlive_its_lease(
        self, which: int, again: bool, outcome: Outcome, mood: Mood, send: bool, by: Interruption | None
    ) -> None:
        """Let a worker stand still until another has its message, and then go on."""
        execution = self._execution(which)
        execution.stalled = True
        self.world.pass_time(61)
        if again:
            self.world.broker.restore(execution.copy)
        else:
            Recovery(self.world.queue_log).run_pass()
        for copy in self._due[:3]:
            self.world.deliver(copy)
        if execution in self.world.executions:
            self._finish(execution, outcome, mood, send, by)

    @precondition(lambda self: any(execution.stalled for execution in self.world.executions))
    @rule()
    def wake(self) -> None:
        self.world.wake()

    # -- time and recovery ---------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([7, 31, 31, 61, 61, 61, 130, 700, 700, RETENTION + 1]))
    def pass_time(self, seconds: int) -> None:
        self.world.pass_time(seconds)

    @rule(mood=_WELL_MOSTLY, everything=st.booleans(), by=_OF_A_WORKER)
    def recover(self, mood: Mood, everything: bool, by: Interruption | None) -> None:
        queue_log, self.world.broker.mood = self.world.queue_log, mood
        try:
            with self.world.interrupted(by):
                if everything:
                    Rescue.of(queue_log).publish_waiting(60.0)
                else:
                    Recovery(queue_log).run_pass()
        except (KilledError, OperationalError):
            pass
        finally:
            self.world.broker.mood = Mood.WELL

    # -- what holds ----------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.come_to_rest(poison=self.poison)

    # -- what rules share ----------------------------------------------------------------------------------------------

    @property
    def _due(self) -> list[Copy]:
        return self.world.broker.due(self.world.clock.now)

    def _execution(self, which: int) -> Execution:
        return self.world.executions[which % len(self.world.executions)]

    def _finish(self, execution: Execution, outcome: Outcome, mood: Mood, send: bool, by: Interruption | None) -> None:
        if outcome in (Outcome.RETRY, Outcome.RETRY_LATER) and execution.runs_body:
            self.world.broker.mood = mood
        with self.world.interrupted(by):
            self.world.finish(execution, outcome, send=send)
        self.world.broker.mood = Mood.WELL

    def _lose(self, execution: Execution, told: bool, again: bool) -> None:
        self.world.lose(execution, told=told)
        if again:
            self.world.broker.restore(execution.copy)
