"""The verdict itself: what it must find, and what it must not take for a fault."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from celery_idempotent.core.decision import MAX_TAKEOVERS
from tests.chaos.audit import Audit, Committed, Outcome, Run, audit, runs_of
from tests.chaos.environment import Done
from tests.chaos.plan import FAULTS, KILLS, LEASE, SENDINGS, TRANSACTIONS, Step, make_plan
from tests.support.ledger import Entry

STEP = Step("step")
FIRST = Run("step", retries=0, pid=1, start=10.0, end=11.0)
DIED = replace(FIRST, end=None)
SECOND = Run("step", retries=0, pid=2, start=14.0, end=15.0)
KILL = Done("kill a child", at=12.0, until=12.1, pids={1: 12.1})
PAUSE = Done("pause a worker past its lease", at=10.5, until=10.5 + 1.5 * LEASE, pids={1: 10.5 + 1.5 * LEASE})
READABLE = Outcome("id", "step", "SUCCESS", "step")
ATOMIC, ORDERED = Step("step", atomic=True), Step("step", ordered=True)


def judged(
    *runs: Run,
    faults: tuple[Done, ...] = (),
    step: Step = STEP,
    outcome: Outcome = READABLE,
    effects: int = 0,
    orders: int = 0,
    guarded: bool = True,
) -> Audit:
    committed = Committed(Counter(step=effects), Counter(step=orders))
    return audit({step.key: step}, runs, faults, [outcome], rows={} if guarded else None, committed=committed)


def test_one_run_is_as_it_should_be() -> None:
    assert judged(FIRST).violations() == []


@pytest.mark.parametrize("runs", [(), (DIED,)], ids=["never run", "died"])
def test_a_message_that_never_ended_is_lost(runs: tuple[Run, ...]) -> None:
    assert judged(*runs, faults=(KILL,)).lost == ["step"]


def test_a_retry_that_did_not_come_is_a_loss() -> None:
    assert judged(FIRST, step=Step("step", retries=1)).lost == ["step"]


def test_another_run_of_a_body_that_died_is_a_recovery() -> None:
    found = judged(DIED, SECOND, faults=(KILL,))
    assert found.violations() == []
    assert [(recovery.died, recovery.again) for recovery in found.recoveries] == [(12.0, 14.0)]


def test_another_run_without_a_death_is_a_violation() -> None:
    assert judged(FIRST, SECOND).doubled == ["step"]


def test_the_death_of_another_process_explains_nothing() -> None:
    assert judged(FIRST, SECOND, faults=(replace(KILL, pids={3: 12.1}),)).doubled == ["step"]


def test_a_death_after_the_process_went_on_to_another_body_explains_nothing() -> None:
    """What it did before was recorded: it does one thing after another."""
    other = Run("other", retries=0, pid=1, start=11.5, end=None)
    steps = {"step": STEP, "other": Step("other")}
    assert audit(steps, [FIRST, other, SECOND], [KILL], []).doubled == ["step"]


def test_two_at_once_are_a_violation() -> None:
    assert judged(FIRST, replace(SECOND, start=10.4)).concurrent == ["step"]


def test_two_bodies_at_once_after_a_long_pause_are_a_zombie() -> None:
    found = judged(replace(FIRST, end=20.0), replace(SECOND, start=17.0, end=18.0), faults=(PAUSE,))
    assert (found.concurrent, found.zombies, found.doubled) == ([], ["step"], [])
    assert found.violations() == []


def test_a_body_claimed_before_a_pause_is_a_zombie_too() -> None:
    ended, woken = replace(FIRST, pid=2, start=18.0, end=18.5), replace(FIRST, start=PAUSE.until + 0.1, end=25.0)
    assert judged(ended, woken, faults=(PAUSE,)).violations() == []
    other = Run("other", retries=0, pid=1, start=PAUSE.until + 0.05, end=PAUSE.until + 0.06)
    steps = {"step": STEP, "other": Step("other")}
    assert audit(steps, [ended, other, woken], [PAUSE], []).doubled == ["step"]


def test_a_short_pause_explains_nothing() -> None:
    short = replace(PAUSE, kind="pause a worker")
    found = judged(replace(FIRST, end=20.0), replace(SECOND, start=17.0, end=18.0), faults=(short,))
    assert (found.concurrent, found.doubled) == (["step"], ["step"])


def test_a_retry_is_another_attempt() -> None:
    """It is published before the body that asks for it has ended."""
    again = Run("step", retries=1, pid=2, start=10.9, end=12.0)
    assert judged(FIRST, again, step=Step("step", retries=1)).violations() == []


def test_an_at_most_once_task_may_be_abandoned_and_not_run_twice() -> None:
    step, failed = replace(STEP, at_most_once=True), replace(READABLE, state="FAILURE", result="abandoned: it died")
    found = judged(DIED, faults=(KILL,), step=step, outcome=failed)
    assert (found.abandoned, found.violations()) == (["step"], [])
    assert judged(DIED, SECOND, faults=(KILL,), step=step).overrun == ["step"]


@pytest.mark.parametrize(
    ("outcome", "step"),
    [
        (replace(READABLE, state="PENDING", result="None"), STEP),
        (replace(READABLE, result="another"), STEP),
        (replace(READABLE, state="FAILURE"), STEP),
        (READABLE, replace(STEP, fails=True)),
    ],
    ids=["never stored", "another's", "a failure", "a success that should have failed"],
)
def test_a_result_that_says_something_else_is_a_violation(outcome: Outcome, step: Step) -> None:
    assert len(judged(FIRST, step=step, outcome=outcome).unreadable) == 1


def test_a_result_its_owner_could_not_store_is_counted_apart() -> None:
    pending = replace(READABLE, state="PENDING", result="None")
    found = judged(FIRST, faults=(KILL,), outcome=pending)
    assert (len(found.unstored), found.unreadable, found.violations()) == (1, [], [])


def test_a_row_that_is_not_done_is_a_violation() -> None:
    assert audit({"step": STEP}, [FIRST], [], [READABLE], rows={"chaos-step": "pending None"}).unfinished


class TestEffects:
    def test_one_is_as_it_should_be(self) -> None:
        found = judged(FIRST, step=ATOMIC, effects=1)
        assert (found.effects, found.violations()) == (1, [])

    def test_a_body_that_ended_without_one_is_a_violation(self) -> None:
        found = judged(FIRST, step=ATOMIC)
        assert (found.effects, found.effects_lost) == (0, ["step"])
        assert found.violations() == ["committed effect lost: step (1)"]

    def test_two_are_a_violation_whatever_explains_the_second_body(self) -> None:
        found = judged(DIED, SECOND, faults=(KILL,), step=ATOMIC, effects=2)
        assert (found.effects, found.effects_doubled) == (1, ["step"])
        assert found.violations() == ["committed effect doubled: step (1)"]

    def test_a_process_may_run_its_atomic_body_again(self) -> None:
        """Its transaction gave way, or its connection was cut."""
        again = replace(SECOND, pid=FIRST.pid)
        found = judged(FIRST, again, step=ATOMIC, effects=1)
        assert (found.anew, found.doubled, found.violations()) == (["step"], [], [])
        assert judged(FIRST, again).doubled == ["step"], "and no other one"
        assert judged(FIRST, again, step=ATOMIC, effects=1, guarded=False).doubled == ["step"], (
            "nor without a queue log"
        )

    def test_another_process_may_not(self) -> None:
        assert judged(FIRST, SECOND, step=ATOMIC, effects=1).doubled == ["step"]


class TestPoison:
    """A message is given up when so many of its owners died: neither it nor what it sends takes effect then."""

    CHILD = Step("step.child", sent_by="step")
    FAILED = replace(
        READABLE, state="FAILURE", result="message 'chaos-step' already failed: abandoned: the worker died"
    )
    TIMES = range(MAX_TAKEOVERS + 1)
    RUNS = tuple(replace(DIED, pid=time, start=10.0 + 10 * time) for time in TIMES)
    KILLS = tuple(Done("kill a child", 12.0 + 10 * time, 12.1 + 10 * time, {time: 12.1 + 10 * time}) for time in TIMES)

    def judged(self, *more: Run, runs: tuple[Run, ...] = RUNS, effects: int = 0) -> Audit:
        steps = {step.key: step for step in (ATOMIC, self.CHILD)}
        committed = Committed(effects=Counter(step=effects))
        return audit(steps, [*runs, *more], self.KILLS, [self.FAILED], rows={}, committed=committed)

    def test_it_is_no_violation(self) -> None:
        found = self.judged()
        assert (found.poisoned, found.violations()) == (["step"], [])

    def test_to_be_given_up_earlier_is_one(self) -> None:
        found = self.judged(runs=self.RUNS[1:])
        assert (found.poisoned, found.lost, found.effects_lost) == ([], ["step", "step.child"], ["step"])
        assert len(found.unreadable) == 1

    def test_an_effect_or_a_child_of_it_is_one(self) -> None:
        assert self.judged(effects=1).unordered == ["step"]
        assert self.judged(replace(FIRST, key="step.child", pid=99)).unordered == ["step.child"]


class TestOrders:
    def test_one_that_ran_is_as_it_should_be(self) -> None:
        found = judged(FIRST, step=ORDERED, orders=1)
        assert (found.orders, found.violations()) == (1, [])

    def test_one_whose_message_never_ran_is_a_violation(self) -> None:
        found = judged(step=ORDERED, orders=1)
        assert (found.orders, found.orders_lost) == (1, ["step"])
        assert "committed order lost: step (1)" in found.violations()

    def test_a_missing_row_is_a_violation(self) -> None:
        assert judged(step=ORDERED).orders_lost == ["step"]

    def test_a_message_that_ran_without_one_is_a_violation(self) -> None:
        found = judged(FIRST, step=ORDERED)
        assert (found.unordered, found.orders_lost) == (["step"], [])
        assert found.violations() == ["rolled back, and sent or there: step (1)"]

    def test_two_are_a_violation(self) -> None:
        found = judged(FIRST, step=ORDERED, orders=2)
        assert (found.orders, found.violations()) == (1, ["committed order doubled: step (1)"])

    def test_a_rolled_back_order_is_gone_and_its_message_never_runs(self) -> None:
        def rolled_back(*runs: Run, orders: int = 0) -> list[str]:
            committed = Committed(orders=Counter(step=orders), rolled_back=frozenset({"step"}))
            return audit({}, runs, [], [], committed=committed).violations()

        assert rolled_back() == []
        assert rolled_back(FIRST) == rolled_back(orders=1) == ["rolled back, and sent or there: step (1)"]


def test_a_late_recovery_is_found_unless_a_server_was_away() -> None:
    late = replace(SECOND, start=12.0 + LEASE + 3.0, end=30.0)
    assert len(judged(DIED, late, faults=(KILL,)).delays()) == 1
    outage = Done("restart the store", at=13.0, until=14.0)
    assert judged(DIED, late, faults=(KILL, outage)).delays() == []


class TestCalledOff:
    REVOKED = Outcome("id", "step", "REVOKED", "terminated")
    REVOKE = Done("revoke messages", at=12.0, until=12.0, keys=("step",))
    EXPIRING = Step("step", expires=True)

    @pytest.mark.parametrize("runs", [(), (DIED,)], ids=["never run", "died"])
    def test_a_revoked_message_need_not_run(self, runs: tuple[Run, ...]) -> None:
        found = judged(*runs, faults=(KILL, self.REVOKE), outcome=self.REVOKED)
        assert (found.violations(), found.called_off) == ([], ["step"])

    def test_a_revoked_result_without_a_revocation_is_lost(self) -> None:
        found = judged(outcome=self.REVOKED)
        assert (found.lost, len(found.unreadable)) == (["step"], 1)

    def test_an_expired_message_need_not_run(self) -> None:
        failed = Outcome("id", "step", "FAILURE", "message step has failed: expired: it was not started in time")
        assert judged(step=self.EXPIRING, outcome=failed).called_off == ["step"]
        assert judged(step=self.EXPIRING, outcome=failed).violations() == []

    def test_one_that_succeeded_has_run(self) -> None:
        assert judged(step=self.EXPIRING, outcome=READABLE).lost == ["step"]
        assert judged(faults=(self.REVOKE,), outcome=READABLE).lost == ["step"]

    def test_it_does_not_run_again_without_a_death(self) -> None:
        assert judged(FIRST, SECOND, faults=(self.REVOKE,), outcome=self.REVOKED).doubled == ["step"]


def test_bodies_that_share_a_process_die_together() -> None:
    """Beside others, the last to begin is not the last to end: what had ended long before was recorded."""
    green = Run("step", retries=0, pid=1, start=10.0, end=None, beside=True)
    later = Run("other", retries=0, pid=1, start=11.0, end=None, beside=True)
    steps = {"step": STEP, "other": Step("other")}
    again = [SECOND, replace(SECOND, key="other")]
    assert audit(steps, [green, later, *again], [KILL], []).violations() == []
    early = replace(green, start=1.0, end=2.0)
    assert audit(steps, [early, later, *again], [KILL], []).doubled == ["step"]


def test_a_ledger_is_read_by_process() -> None:
    def note(event: str, pid: int, at: float) -> Entry:
        return Entry(event, "plain", "id", "m", 0, "w", pid, at, "step")  # type: ignore[arg-type]

    entries = [note("start", 1, 1.0), note("start", 2, 2.0), note("raise", 1, 3.0)]
    assert runs_of(entries) == [Run("step", 0, 1, 1.0, 3.0), Run("step", 0, 2, 2.0, None)]


class TestPlan:
    def test_the_same_seed_makes_the_same_plan(self) -> None:
        assert make_plan(5, tasks=300, kills=20) == make_plan(5, tasks=300, kills=20)
        assert make_plan(5, tasks=300, kills=20) != make_plan(6, tasks=300, kills=20)

    def test_leaves_out_what_needs_transactions_where_there_are_none(self) -> None:
        plan = make_plan(7, tasks=2000, kills=25, transactions=False)
        assert {sending.kind for sending in plan.sendings} == {*SENDINGS} - TRANSACTIONS
        assert plan.rolled_back() == set()

    def test_a_plan_has_the_asked_counts_and_every_kind(self) -> None:
        plan = make_plan(7, tasks=2000, kills=25)
        kinds = [fault.kind for fault in plan.faults]
        assert len(plan.steps()) >= 2000
        assert sum(kind in KILLS for kind in kinds) == 25
        assert set(FAULTS) | set(KILLS) == set(kinds)
        assert {sending.kind for sending in plan.sendings} == set(SENDINGS)
        assert [fault.after for fault in plan.faults] == sorted(fault.after for fault in plan.faults)

    def test_a_plan_rolls_back_outboxes_alone(self) -> None:
        plan = make_plan(7, tasks=2000, kills=25)
        rolled_back = [sending for sending in plan.sendings if sending.rolled_back]
        assert {sending.kind for sending in rolled_back} == {"outbox"}
        assert plan.rolled_back() == {sending.key for sending in rolled_back}
        assert not plan.rolled_back() & set(plan.steps())
        assert any(step.ordered for step in plan.steps().values())
