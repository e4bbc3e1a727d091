"""Check the app's settings and the options of its tasks."""

from __future__ import annotations

from collections.abc import Iterator

from celery_idempotent.doctor.facts import Facts
from celery_idempotent.doctor.finding import Finding

__all__ = ["check_app"]


def check_app(facts: Facts) -> Iterator[Finding]:
    """Yield what is wrong with the app and its tasks."""
    app = facts.app
    for wrong in app.wrong:
        yield Finding("settings", wrong, "correct it as the message says")
    if not app.enabled:
        yield Finding(
            "guard-off",
            "idempotent_enabled is False: the guard is off for all tasks",
            "idempotent_enabled = True, or remove the setting, as soon as the incident or the load test is over",
        )
    if not app.tasks and not app.wrong:
        yield Finding(
            "no-guarded-tasks",
            "the app has no task with base=IdempotentTask, or does not import their modules",
            "give the tasks base=IdempotentTask, and add their modules to `imports` or `include`",
        )
    if app.eager:
        yield Finding(
            "always-eager",
            f"task_always_eager is on, and calls are recorded in {facts.store.name}",
            "task_always_eager = False; in tests, use the pytest plugin, or idempotent_store = 'sqlite://'",
        )
    if app.without_base:
        yield Finding(
            "base-missing",
            "these tasks have options of the guard, and not its base class",
            "give them base=IdempotentTask; or, if the attributes are your own, ignore this finding",
            app.without_base,
        )
    if replaced := facts.names(lambda task: task.past_the_guard):
        yield Finding(
            "past-the-guard",
            "something replaced __call__ and before_start of these tasks' classes after they were bound to the app",
            "make it call the methods that it replaces; or override them in a class, and use that as the task's base",
            replaced,
        )
    if lost := facts.names(lambda task: task.reported_lost):
        yield Finding(
            "late-ack-worker-lost",
            "acks_late without reject_on_worker_lost",
            "task_reject_on_worker_lost = True, or reject_on_worker_lost=True on the task",
            lost,
        )
    if stays := facts.names(lambda task: task.failure_stays):
        yield Finding(
            "early-ack-failure",
            "early acknowledgement, and an id that later calls have too",
            'acks_late=True and reject_on_worker_lost=True on the task, so that the message runs again; or on_abandoned="fail", if it must not',
            stays,
        )
    awaited = facts.names(lambda task: task.awaited)
    if not app.result_backend and awaited:
        yield Finding(
            "no-result-backend",
            "there is no result backend, but these tasks do not ignore their results",
            "result_backend = ...; or task_ignore_result = True, or ignore_result=True on the task, if no caller waits",
            awaited,
        )
    if app.result_backend and (tracked := facts.names(lambda task: task.track_started and task.awaited)):
        yield Finding("track-started", "track_started is on", "task_track_started = False", tracked)
    if app.result_backend and awaited and app.result_expires is not None and app.result_expires < app.retention:
        yield Finding(
            "result-expires",
            f"results are kept for {app.result_expires:g} s, and rows for {app.retention:g} s",
            f"result_expires = {app.retention:g}; or a shorter idempotent_retention; or ignore this finding, if no caller waits that long",
        )
    for entry in app.fixed_entries:
        if entry.stays_taken:
            left = "until it is purged" if entry.unique_for is None else f"for {entry.unique_for:g} s"
            yield Finding(
                "beat-fixed-id",
                f"beat's entry {entry.name!r} has the message id {entry.message_id!r} at each tick, and that stays taken {left} after a run",
                "leave the message_id out and use a scheduler of this library, such as celery_idempotent.beat:PersistentScheduler; or give "
                "the task a unique_for that is shorter than the interval",
                (entry.task,),
            )
    if app.recovery_interval == 0 and app.tasks:
        early = facts.names(lambda task: not task.acks_late)
        yield Finding(
            "recovery-off",
            "idempotent_recovery_interval is 0, so workers do not recover"
            + ("; with early acknowledgement the broker has no copy of what runs" if early else ""),
            "idempotent_recovery_interval = 30; or run `celery -A proj idempotent recover --watch`, and ignore this finding",
            early,
        )
