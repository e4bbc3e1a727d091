"""Read from the app's beat schedule which entries have the same message id at each tick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from celery.beat import BeatLazyFunc
from celery.schedules import maybe_schedule

from celery_idempotent.doctor.facts import EntryFacts
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.canvas_ids import is_guarded

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["read_fixed_entries"]


def read_fixed_entries(app: Celery) -> Iterator[EntryFacts]:
    """Yield the entries of ``beat_schedule`` whose calls all have one message id: their options name it, or their task makes it of the arguments."""
    for name, entry in (app.conf.beat_schedule or {}).items():
        of = entry if isinstance(entry, Mapping) else vars(entry)
        task = app.tasks.get(of.get("task"))
        if not is_guarded(task):
            continue
        try:
            message_id = _fixed_id(task, of.get("args") or (), of.get("kwargs") or {}, of.get("options") or {})
            if message_id is not None:
                interval = _interval(app, of.get("schedule"))
                yield EntryFacts(str(name), task.name, message_id, interval, task.idempotency.unique_for)
        except ConfigurationError:
            continue  # of the task, which is reported; or of this call, which beat's log has


def _fixed_id(task: Any, args: Any, kwargs: Any, options: Mapping[str, Any]) -> str | None:
    options_of_task = task.idempotency
    if not options_of_task.idempotent:
        return None
    given = options.get("message_id")
    if given is not None:
        return str(given)
    make = options_of_task.message_id
    if make is None:
        return options.get("task_id")
    if any(isinstance(argument, BeatLazyFunc) for argument in (*args, *kwargs.values())):
        return None
    try:
        first, second = (make(tuple(args), dict(kwargs)) for _ in range(2))
    except TypeError:
        return None  # the arguments do not fit, so it is never sent
    return str(first) if first == second else None


def _interval(app: Celery, schedule: Any) -> float | None:
    """Return the seconds between the next two ticks; ``None`` if they are not known."""
    schedule = maybe_schedule(schedule, app=app)
    run_every = getattr(schedule, "run_every", None)
    if isinstance(run_every, timedelta):
        return run_every.total_seconds()
    try:
        now = schedule.maybe_make_aware(schedule.now())
        first = schedule.remaining_estimate(now)
        after_it = now + first + timedelta(seconds=1)  # the schedule's clock goes on between the two
        return float((schedule.remaining_estimate(after_it) - first).total_seconds())
    except Exception:  # noqa: BLE001 - a schedule of any class
        return None
