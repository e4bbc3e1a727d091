"""Judge a run of chaos by what the sender, the bodies and the faults have noted.

The ledger of the bodies is the witness, and of transactions what they have committed; the queue log is asked only whether it agrees.
Whatever cannot be explained by a death or a pause that was noted is a violation.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from statistics import quantiles

from celery_idempotent.core.decision import MAX_TAKEOVERS
from tests.chaos.environment import GEVENT_NAME, Done
from tests.chaos.plan import KILLS, LEASE, Step
from tests.support.ledger import Entry

__all__ = ["READY", "Audit", "Committed", "Outcome", "Recovery", "Run", "audit", "runs_of"]

#: Faults in which a process dies whose body then counts as ended.
DEADLY = (*KILLS, "shut down a worker cold")

#: What the result of a task that may run at most once says when its owner died: by its row, or by the worker that lost a child.
ABANDONED = ("abandoned: ", "Worker exited prematurely")

#: What the result of a message says that was revoked or has expired: by Celery, or by its row.
CALLED_OFF = ("revoked", "expired")

#: States in which a result is there.
READY = ("SUCCESS", "FAILURE", "REVOKED")

#: Seconds until the outcome of a body is written that ends while others run in its process.
WRITTEN_WITHIN = 2.0

#: What keeps a server from answering.
OUTAGES = tuple(f"{verb} the {server}" for verb in ("restart", "kill", "pause") for server in ("store", "broker"))

#: Seconds by which a death may be noted late.
CLOCK = 0.2

#: Seconds over the lease within which a message runs again whose owner was killed.
MARGIN = 2.0


@dataclass(frozen=True, slots=True)
class Run:
    """One body.

    Attributes:
        key: The step's.
        retries: Celery's count.
        pid: The process that ran it.
        start: When it was entered.
        end: When it returned or raised; ``None`` when it never did.
        beside: Whether its process runs others at the same time.
    """

    key: str
    retries: int
    pid: int
    start: float
    end: float | None
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """A body that died and was run again.

    Attributes:
        key: The step's.
        died, again: When; a kill counts from its beginning.
        outage: Whether a server was away meanwhile.
    """

    key: str
    died: float
    again: float
    outage: bool

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.again - self.died


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the caller of a step can see in the end.

    Attributes:
        task_id: What the caller asks under.
        key: The step's.
        state: Celery's.
        result: The value, or the error as text.
    """

    task_id: str
    key: str
    state: str
    result: str


@dataclass(frozen=True, slots=True)
class Committed:
    """What transactions have written.

    Attributes:
        effects: How many effects there are of each atomic step, by its key.
        orders: How many orders of each step that was sent with one.
        rolled_back: Keys of sendings whose transaction was rolled back on purpose.
    """

    effects: Counter[str] = field(default_factory=Counter)
    orders: Counter[str] = field(default_factory=Counter)
    rolled_back: frozenset[str] = frozenset()


@dataclass(slots=True)
class Audit:
    """What a run of chaos came to.

    Attributes:
        sent: Messages that had to run.
        bodies: Bodies that were entered.
        lost: Steps whose last body never ended.
        called_off: Steps that were revoked or have expired, and did not run to their end.
        abandoned: Steps of at-most-once tasks that their owner's death ended, as they are meant to.
        poisoned: Other steps that were taken for poison: each of so many owners died that a message is given up for it.
        again: Runs beyond the first of one attempt: of bodies that died or ended just before their process did.
        anew: Runs beyond the first of atomic bodies whose transaction gave way or broke: by the same process, under the same claim.
        doubled: The same as ``again``, without a death or a pause to explain them.
        zombies: Bodies that ran on behind a pause longer than their lease while another ran.
        concurrent: Two bodies of one message at once, without such a pause.
        overrun: Bodies of at-most-once tasks that were entered twice.
        unstored: Results that nobody stored, because the owner died between its body's end and that, and nothing was delivered
            again.
        unreadable: Results that do not say what they should, without such a death.
        unfinished: Rows that are not done.
        recoveries: Bodies that died and were run again.
        effects: Atomic steps that have had their effect.
        effects_lost: Those that have had none.
        effects_doubled: Those that have had it more than once.
        orders: Orders that were committed.
        orders_lost: Orders that were committed and whose message never ran, or that should be there and are not.
        orders_doubled: Orders that are there more than once.
        unordered: What ran or is there although its transaction was rolled back, or never committed.
    """

    sent: int = 0
    bodies: int = 0
    lost: list[str] = field(default_factory=list)
    called_off: list[str] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    poisoned: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    anew: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    zombies: list[str] = field(default_factory=list)
    concurrent: list[str] = field(default_factory=list)
    overrun: list[str] = field(default_factory=list)
    unstored: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    effects: int = 0
    effects_lost: list[str] = field(default_factory=list)
    effects_doubled: list[str] = field(default_factory=list)
    orders: int = 0
    orders_lost: list[str] = field(default_factory=list)
    orders_doubled: list[str] = field(default_factory=list)
    unordered: list[str] = field(default_factory=list)

    def seconds_to_recovery(self, *, with_outages: bool) -> list[float]:
        """How long each took, sorted; those during which a server was away are left out unless wanted."""
        return sorted(recovery.seconds for recovery in self.recoveries if with_outages or not recovery.outage)

    def violations(self) -> list[str]:
        """Return what the library promises and this run has not seen; empty when all is well."""
        return [
            f"{what}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''} ({len(keys)})"
            for what, keys in (
                ("lost", self.lost),
                ("run again without a death", self.doubled),
                ("two at once", self.concurrent),
                ("at most once, and run twice", self.overrun),
                ("result not readable", self.unreadable),
                ("row not done", self.unfinished),
                ("committed effect lost", self.effects_lost),
                ("committed effect doubled", self.effects_doubled),
                ("committed order lost", self.orders_lost),
                ("committed order doubled", self.orders_doubled),
                ("rolled back, and sent or there", self.unordered),
            )
            if keys
        ]

    def delays(self) -> list[str]:
        """Return what took longer than it may on a machine that has time for it; empty when all is well."""
        seconds = self.seconds_to_recovery(with_outages=False)
        if not seconds or percentile(seconds, 99) <= LEASE + MARGIN:
            return []
        return [f"recovery p99 of {percentile(seconds, 99):.1f} s is beyond the lease of {LEASE:g} s + {MARGIN:g} s"]


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of sorted values."""
    return values[0] if len(values) == 1 else quantiles(values, n=100, method="inclusive")[percent - 1]


def runs_of(entries: Iterable[Entry]) -> list[Run]:
    """Return the bodies that a ledger tells of, by their start."""
    runs: list[Run] = []
    open_: dict[tuple[str, int], int] = {}
    for entry in entries:
        assert entry.detail is not None, "each note of a run of chaos has the key of its step"
        if entry.event == "start":
            open_[entry.detail, entry.pid] = len(runs)
            beside = (entry.worker or "").startswith(GEVENT_NAME)
            runs.append(Run(entry.detail, entry.retries, entry.pid, entry.at, None, beside))
        else:
            place = open_.pop((entry.detail, entry.pid))
            run = runs[place]
            runs[place] = replace(run, end=entry.at)
    return sorted(runs, key=lambda run: run.start)


def audit(
    steps: Mapping[str, Step],
    runs: Sequence[Run],
    faults: Sequence[Done],
    outcomes: Iterable[Outcome],
    *,
    rows: Mapping[str, str] | None = None,
    committed: Committed | None = None,
) -> Audit:
    """Judge a run.

    Args:
        steps: What had to run, by key.
        runs: What ran.
        faults: What was done meanwhile.
        outcomes: What callers see in the end.
        rows: Status of each row of the queue log that is not done, by task and message id; ``None`` without one.
        committed: What is there of what transactions wrote; ``None`` when there were none.
    """
    found = Audit(
        sent=len(steps), bodies=len(runs), unfinished=[f"{key} {status}" for key, status in (rows or {}).items()]
    )
    fates = _Fates(runs, faults)
    by_key: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_key[run.key].append(run)
    outcomes = list(outcomes)
    given_up = {outcome.key for outcome in outcomes if _gave_up(outcome)}
    may_be_off = {step.key for step in steps.values() if step.expires}
    may_be_off |= {key for fault in faults for key in fault.keys}
    found.called_off = sorted({outcome.key for outcome in outcomes if _called_off(outcome)} & may_be_off)
    found.poisoned = [
        key
        for key in sorted(given_up)
        if not steps[key].at_most_once and fates.lost_owners(by_key[key]) > MAX_TAKEOVERS
    ]
    for step in steps.values():
        if step.sent_by in found.poisoned:
            continue  # it never was
        # Only with a queue log a process may run an atomic body once more: it can tell that nothing was committed.
        _judge(
            found,
            step,
            by_key[step.key],
            fates,
            given_up=step.key in found.called_off
            or (step.key in given_up and (step.at_most_once or step.key in found.poisoned)),
            anew=step.atomic and rows is not None,
        )
    _judge_committed(found, steps, by_key, committed or Committed())
    for outcome in outcomes:
        step, last = steps[outcome.key], by_key[outcome.key][-1:]
        died = bool(last) and fates.death(last[0]) is not None
        if step.key in found.called_off:
            continue
        if not (_gave_up(outcome) if step.key in found.poisoned else _readable(outcome, step)):
            text = f"{outcome.key} ({outcome.task_id}) {outcome.state} {outcome.result}"
            (found.unstored if died and outcome.state not in READY else found.unreadable).append(text)
    return found


class _Fates:
    """What became of processes, and of the bodies in them."""

    def __init__(self, runs: Sequence[Run], faults: Sequence[Done]) -> None:
        deadly = [fault for fault in faults if fault.kind in DEADLY]
        self._deaths = {pid: gone for fault in deadly for pid, gone in fault.pids.items()}
        self._kills = {pid: fault.at for fault in deadly for pid in fault.pids}
        self._pauses: dict[int, list[Done]] = defaultdict(list)
        for fault in faults:
            if fault.kind == "pause a worker past its lease":
                for pid in fault.pids:
                    self._pauses[pid].append(fault)
        self._outages = [fault for fault in faults if fault.kind in OUTAGES]
        self._starts: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            self._starts[run.pid].append(run.start)

    def death(self, run: Run) -> float | None:
        """When the process died that had begun no other body since this one."""
        died = self._deaths.get(run.pid)
        if run.beside:
            within = run.end is None or died is None or died - run.end < WRITTEN_WITHIN
            return died if died is not None and within and run.start <= died else None
        starts = self._starts[run.pid]
        last = bisect_right(starts, run.start) == len(starts)
        return died if died is not None and last and run.start <= died else None

    def killed(self, run: Run) -> float:
        """When the kill of its process began, which may take a second."""
        return max(self._kills[run.pid], run.start)

    def over(self, run: Run) -> float:
        """When a body was over at the latest that is known: by itself, or with its process."""
        return run.end if run.end is not None else self.death(run) or float("inf")

    def lost_owners(self, runs: Sequence[Run]) -> int:
        """How many of the processes that ran these died of it, or were paused past their lease."""
        return sum(self.death(run) is not None or self.paused(run, float("inf")) for run in runs)

    def paused(self, run: Run, during: float) -> bool:
        """Return whether its process was paused past its lease, before another body began at the time given."""
        return any(run.start <= pause.until and pause.at <= during for pause in self._pauses[run.pid])

    def woke(self, run: Run) -> bool:
        """Return whether this is the first body of a process since it was paused past its lease: it may have claimed it before."""
        starts = self._starts[run.pid]
        before = starts[bisect_right(starts, run.start) - 2] if bisect_right(starts, run.start) > 1 else float("-inf")
        return any(before < pause.at and pause.until <= run.start + CLOCK for pause in self._pauses[run.pid])

    def outage(self, begin: float, end: float) -> bool:
        """Return whether a server was away at some time between."""
        return any(outage.at <= end and begin <= outage.until for outage in self._outages)


def _judge(found: Audit, step: Step, runs: Sequence[Run], fates: _Fates, *, given_up: bool, anew: bool) -> None:
    last = [run for run in runs if run.retries >= step.retries]
    if given_up:
        if step.at_most_once:
            found.abandoned.append(step.key)
    elif not any(run.end is not None for run in last):
        found.lost.append(step.key)
    if step.at_most_once and len(runs) > 1:
        found.overrun.append(step.key)
    for retries in {run.retries for run in runs}:
        # A body that retries publishes its next attempt before it ends: only runs of one attempt are one too many.
        attempt = [run for run in runs if run.retries == retries]
        for before, after in pairwise(attempt):
            _judge_again(found, before, after, fates, anew=anew)
        for one, other in combinations(attempt, 2):
            if fates.over(one) > other.start + CLOCK and one.pid != other.pid:
                (found.zombies if fates.paused(one, other.start) else found.concurrent).append(step.key)


def _judge_again(found: Audit, before: Run, after: Run, fates: _Fates, *, anew: bool) -> None:
    if fates.death(before) is not None and (killed := fates.killed(before)) <= after.start:
        found.again.append(before.key)
        if before.end is None:
            found.recoveries.append(Recovery(before.key, killed, after.start, fates.outage(killed, after.start)))
    elif fates.paused(before, after.start) or fates.woke(after):
        found.again.append(before.key)
    elif anew and before.pid == after.pid:
        found.anew.append(before.key)
    else:
        found.doubled.append(before.key)


def _judge_committed(
    found: Audit, steps: Mapping[str, Step], runs: Mapping[str, Sequence[Run]], committed: Committed
) -> None:
    for step in steps.values():
        ran = runs.get(step.key, ())
        if step.atomic:
            effects = committed.effects[step.key]
            found.effects += effects > 0
            if step.key in found.poisoned:
                found.unordered += [step.key] if effects else []
            elif effects != 1:
                (found.effects_doubled if effects else found.effects_lost).append(step.key)
        if step.sent_by in found.poisoned and ran:
            found.unordered.append(step.key)
        if step.ordered:
            orders = committed.orders[step.key]
            found.orders += orders > 0
            if orders > 1:
                found.orders_doubled.append(step.key)
            if orders and not any(run.end is not None for run in ran):
                found.orders_lost.append(step.key)
            elif not orders:
                # The sender says that it has committed: both are gone, or only one is.
                (found.unordered if ran else found.orders_lost).append(step.key)
    found.unordered += sorted(key for key in committed.rolled_back if runs.get(key) or committed.orders[key])


def _gave_up(outcome: Outcome) -> bool:
    return outcome.state == "FAILURE" and any(words in outcome.result for words in ABANDONED)


def _called_off(outcome: Outcome) -> bool:
    failed = outcome.state == "FAILURE" and any(words in outcome.result for words in CALLED_OFF)
    return outcome.state == "REVOKED" or failed


def _readable(outcome: Outcome, step: Step) -> bool:
    # What may run at most once fails when its owner was taken for dead, even before its body began or when it had ended.
    if step.fails or (step.at_most_once and _gave_up(outcome)):
        return outcome.state == "FAILURE"
    return outcome.state == "SUCCESS" and outcome.result == step.key
