"""Check the rows of the queue log, and the store's clock."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from celery_idempotent.core.decision import AVAILABLE_GRACE
from celery_idempotent.doctor.facts import Facts
from celery_idempotent.doctor.finding import Finding

__all__ = ["check_rows"]

#: Seconds by which synchronized clocks differ at most.
_IN_STEP = 2.0

#: Recovery passes that may be late or fail before recovery is presumed not to run; and the least number of seconds for that.
_PASSES_IN_VAIN = 5
_AT_LEAST = 120.0

#: Seconds past its retention after which a row counts as not purged, since a long log is purged bit by bit.
_PURGED_WITHIN = 86400.0


def check_rows(facts: Facts) -> Iterator[Finding]:
    """Yield what the rows and the clock show: no recovery, no purge, waiting messages without a task."""
    store, app = facts.store, facts.app
    health = store.health
    if health is None:
        return
    now = health.read_at
    if store.local_clock is not None:
        skew = (store.local_clock - now).total_seconds()
        if abs(skew) > _IN_STEP + store.clock_error:
            yield Finding(
                "clock-skew",
                f"this host's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} that of {store.name}"
                + (
                    f", more than the {AVAILABLE_GRACE:g} s of grace for a retry" if abs(skew) > AVAILABLE_GRACE else ""
                ),
                "synchronize the clocks of all hosts, by NTP",
            )
    yield from _left_waiting(facts)
    patience = timedelta(seconds=max(_AT_LEAST, _PASSES_IN_VAIN * app.recovery_interval))
    overdue = {
        "a message whose owner's lease ran out at {} was not published again": health.lapsed_since,
        "a message recorded at {} was not published": health.unsent_since,
    }
    for what, since in overdue.items():
        if since is not None and now - since > patience:
            yield Finding(
                "recovery-behind",
                what.format(since.isoformat(sep=" ", timespec="seconds")),
                "idempotent_recovery_interval = 30 in a running worker, or `celery -A proj idempotent recover`; its log says what goes wrong",
            )
    done = health.done_since
    kept = max(app.retention, app.failure_retention)
    if done is not None and (now - done).total_seconds() > kept + _PURGED_WITHIN:
        yield Finding(
            "purge-behind",
            f"a row that was done at {done.isoformat(sep=' ', timespec='seconds')} is still there, but retention is {kept:g} s",
            "idempotent_recovery_interval = 30 in a running worker, or `celery -A proj idempotent purge`",
        )


def _left_waiting(facts: Facts) -> Iterator[Finding]:
    """Yield waiting messages whose tasks are not guarded in this app."""
    app, guarded = facts.app, {task.name for task in facts.app.tasks} - set(facts.app.unguarded)
    waiting = [name for name in facts.store.waiting if name not in guarded]
    if unguarded := tuple(name for name in waiting if name in app.unguarded):
        yield Finding(
            "waiting-unguarded",
            "recorded messages are waiting; their tasks have no base=IdempotentTask here, or their guard is off (idempotent=False, idempotent_enabled)",
            "let them end before; what has run meanwhile: `celery -A proj idempotent forget --task NAME --status pending --force`; "
            "what the broker has lost: `... recover --task NAME --lost-after 0`",
            unguarded,
        )
    if doubted := tuple(name for name in facts.store.doubted if name in guarded):
        yield Finding(
            "waiting-doubted",
            "messages that were recorded wait since the guard was off; those that the broker still has end as they run",
            "what has run: `celery -A proj idempotent forget --task NAME --error 'unguarded*' --force`; "
            "what the broker has lost: `... recover --task NAME --lost-after 0`",
            doubted,
        )
    if unknown := tuple(name for name in waiting if name not in app.unguarded):
        yield Finding(
            "waiting-unknown",
            "recorded messages are waiting for tasks that this app does not have",
            "import their modules; ignore this finding if another app with the same store has them; or `... forget --task NAME --force`",
            unknown,
        )
