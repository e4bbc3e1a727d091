"""One run of chaos, from the plan to the verdict."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kombu.exceptions import OperationalError

from celery_idempotent import StoreError
from celery_idempotent.core.records import RowFilter, Status
from celery_idempotent.errors import LeaseLostError
from tests.chaos.audit import READY, Audit, Committed, Outcome, Run, audit, runs_of
from tests.chaos.effects_db import Effect, Order
from tests.chaos.environment import QUEUE, Done, Environment, open_environment
from tests.chaos.faults import Faults
from tests.chaos.plan import Plan, make_plan, message_id
from tests.chaos.tasks import ASIDE, GEVENT
from tests.chaos.variants import VARIANTS

__all__ = ["Chaos", "run"]

#: Seconds that are waited for what is still missing when all was sent, and for which nothing may have happened before it is given up.
SETTLE_WITHIN, QUIET = 120.0, 25.0

#: Faults whose sendings may be sent before it is their turn: what is under way while a fault lasts.
AHEAD = 4


@dataclass(frozen=True)
class Chaos:
    """A run of chaos that is over.

    Attributes:
        variant, store, broker: Where it took place.
        plan: What was planned.
        done: The faults, as they came about.
        runs: The bodies.
        audit: The verdict.
        refused: What zombies came back with and the store did not take.
        relayed: Messages that were committed and left for a relay to publish.
        gave_up: Workers that ended by themselves when their broker was gone, and were replaced.
        seconds: From the first sending to the last body.
        began: Seconds since the epoch.
    """

    variant: str
    store: str
    broker: str
    plan: Plan
    done: list[Done]
    runs: list[Run]
    audit: Audit
    refused: int
    relayed: int
    gave_up: int
    seconds: float
    began: float

    @property
    def faults(self) -> Counter[str]:
        """Count the faults of each kind, without those that hit nothing."""
        return Counter(done.kind for done in self.done if done.kind != "kill the sender" or done.count)


def run(
    directory: Path,
    *,
    seed: int,
    tasks: int,
    kills: int,
    variant: str = "idempotent",
    store: str = "postgresql",
    broker: str = "redis",
    say: Callable[[str], None] = lambda _: None,
) -> Chaos:
    """Run it.

    Args:
        directory: For logs, ledger and journals.
        seed: Of the plan.
        tasks: Of the plan.
        kills: Of the plan.
        variant: One of :data:`tests.chaos.variants.VARIANTS`.
        store: Kind of server; one is started for this run.
        broker: Likewise.
        say: Is told how it goes.

    Raises:
        NotInstalledError: A server's programs are not on this machine.
        AssertionError: A server, a worker or the sender did not do what it is there for; that is no verdict.
    """
    with open_environment(directory, variant=VARIANTS[variant], store=store, broker=broker) as environment:
        plan = make_plan(seed, tasks=tasks, kills=kills, transactions=environment.transactions)
        steps, rolled_back = plan.steps(), plan.rolled_back()
        faults = Faults(environment, seed)
        environment.start_sender(plan, tasks=tasks, kills=kills)
        began = time.time()
        for place, fault in enumerate(plan.faults):
            ahead = plan.faults[place + AHEAD].after if place + AHEAD < len(plan.faults) else len(plan.sendings)
            environment.allow(max(fault.after, ahead))
            _wait_for_sender(environment, fault.after)
            environment.supervise()
            faults.do(fault)
            if place % 10 == 9:
                say(
                    f"{time.time() - began:4.0f} s: {environment.count_sent()} of {len(plan.sendings)} sent, {place + 1} faults"
                )
        environment.allow(len(plan.sendings))
        _wait_for_sender(environment, len(plan.sendings))
        say(f"{time.time() - began:4.0f} s: all was sent")
        _settle(environment, set(steps))
        runs = [run for run in runs_of(environment.ledger.entries()) if run.key in steps or run.key in rolled_back]
        last = max((run.end or run.start for run in runs), default=began)
        outcomes = list(_outcomes(environment))
        committed = Committed(
            effects=Counter(effect.key for effect in environment.effects_db.read(Effect)),
            orders=Counter(order.key for order in environment.effects_db.read(Order)),
            rolled_back=frozenset(rolled_back),
        )
        rows = _rows_not_done(environment) if environment.variant.guarded else None
        if rows:
            environment.dump_stacks()
        logs = list(environment.logs())
        return Chaos(
            variant=variant,
            store=store,
            broker=broker,
            plan=plan,
            done=faults.done,
            runs=runs,
            audit=audit(steps, runs, faults.done, outcomes, rows=rows, committed=committed),
            refused=sum(log.count(_REFUSED) for log in logs),
            relayed=sum(log.count(_RELAYED) for log in logs),
            gave_up=environment.gave_up,
            seconds=last - began,
            began=began,
        )


#: What the library logs when a body ends whose claim is another's by then.
_REFUSED = str(LeaseLostError("", 0)).partition(": ")[2]

#: What it logs when it publishes a message that was committed and not published.
_RELAYED = " is published: it waited "


def _wait_for_sender(environment: Environment, sendings: int) -> None:
    deadline = time.monotonic() + 300
    while environment.count_sent() < sendings:
        assert environment.sender_status in (None, 0), (environment.directory / "sender.log").read_text()[-3000:]
        assert time.monotonic() < deadline, (
            f"the sender is stuck: {(environment.directory / 'sender.log').read_text()[-3000:]}"
        )
        time.sleep(0.02)


def _settle(environment: Environment, keys: set[str]) -> None:
    """Wait until all has run, its rows are done and its results are there, or nothing happens any more.

    A message that the broker has lost is found by what overtakes it, so there has to be traffic. A result that its worker could not
    store any more is stored when the broker delivers the message again, whose row is done since.
    """
    begin = changed = time.monotonic()
    seen, number, ready = (-1, -1), 0, set[str]()
    while time.monotonic() - begin < SETTLE_WITHIN and time.monotonic() - changed < QUIET:
        environment.supervise()
        with suppress(OperationalError, StoreError):
            for queue in (QUEUE, ASIDE, GEVENT):
                environment.app.tasks["plain"].apply_async((f"tail-{number}", 0.0), queue=queue)
            number += 1
        time.sleep(0.5)
        done = environment.variant.guarded and not _rows_not_done(environment)
        unready = {task_id for task_id, _ in _known(environment)} - ready
        ready |= {task_id for task_id in unready if environment.app.backend.get_state(task_id) in READY}
        now = (sum(entry.detail in keys for entry in environment.ledger.entries("end")), len(ready))
        if now != seen:
            seen, changed = now, time.monotonic()
        if done and unready <= ready:
            return
    environment.dump_broker()


def _rows_not_done(environment: Environment) -> dict[str, str]:
    store = environment.app.queue_log.store
    # What a body calls is known by its Celery id.
    ours = (RowFilter(message_id=message_id("*"), limit=1000), RowFilter(task_name="child", limit=1000))
    return {
        f"{row.key.task_name} {row.key.message_id}": f"{row.status} {row.processed_status}"
        for which in ours
        for status in (Status.PENDING, Status.PROCESSING)
        for row in store.rows(replace(which, status=status))
    }


def _known(environment: Environment) -> set[tuple[str, str]]:
    """Task id and key of all that somebody may ask for: callers, and bodies that have committed a call."""
    known = {result for sent in environment.sent() for result in sent.results}
    return known | {
        (effect.sent, f"{effect.key}.child") for effect in environment.effects_db.read(Effect) if effect.sent
    }


def _outcomes(environment: Environment) -> Iterator[Outcome]:
    for task_id, key in _known(environment):
        meta: Any = environment.app.backend.get_task_meta(task_id)
        yield Outcome(task_id, key, meta["status"], str(meta["result"]))
