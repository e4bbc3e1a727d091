# What beat.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, D100, D103, F821, INP001

# %% after block 1
from celery.beat import Scheduler

from celery_idempotent.core.records import MessageKey
from tests.support.waiting import wait_until

app.conf.update(idempotent_store="sqlite://", task_always_eager=True)
entry = app.conf.beat_schedule["nightly-report"]


def tick(entry):
    beats = [Scheduler(app, lazy=True) for _ in range(2)]
    return [beat.apply_async(beat.Entry(name="entry", app=app, **entry)).duplicate for beat in beats]


assert tick(entry) == [False, True]
assert tick(entry) == [True, True]
brief = app.task(base=IdempotentTask, name="brief", unique_for=0.2)(nightly_report.run)
assert tick({**entry, "task": brief.name}) == [False, True]
wait_until(lambda: tick({**entry, "task": brief.name}) == [False, True], timeout=10)
# %% after block 2
weekly = app.conf.beat_schedule["weekly-report"]
assert tick(weekly) == [False, True]
assert app.queue_log.store.find(MessageKey("weekly-report", weekly_report.name)).duplicates == 1
app.queue_log.close()
app.close()
