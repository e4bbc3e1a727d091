# What beat.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, D100, D103, F821, INP001

# %% after block 1
from celery.beat import ScheduleEntry, Scheduler
from celery.utils.imports import symbol_by_name

from celery_idempotent.core.records import RowFilter

app.conf.update(idempotent_store="sqlite://", task_always_eager=True)


def fire(kind, name):
    beats = [kind(app, lazy=True) for _ in range(2)]
    entry = ScheduleEntry(name=name, app=app, **app.conf.beat_schedule[name])
    return [beat.apply_async(entry, advance=False) for beat in beats]


first, second = fire(symbol_by_name(app.conf.beat_scheduler), "nightly-report")
assert first is not None
assert second is None
(tick,) = app.queue_log.store.rows(RowFilter(task_name="celery.beat"))
assert tick.key.message_id.startswith("beat:")
assert tick.task_id == first.id
assert tick.duplicates == 1
# %% after block 2
app.conf.beat_schedule["mine"] = app.conf.beat_schedule["nightly-report"]
assert [result is None for result in fire(MyScheduler, "mine")] == [False, True]
# %% after block 3
assert [result.duplicate for result in fire(Scheduler, "sync")] == [False, True]
app.queue_log.close()
app.close()
