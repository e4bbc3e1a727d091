"""The Celery app: ``celery -A example_project.celery_app worker``."""

from __future__ import annotations

from celery import Celery

from celery_idempotent import IdempotentTask
from example_project.plain import PlainTask
from example_project.settings import Settings

settings = Settings.from_environ()

app = Celery(
    "loans",
    # Of all tasks, Celery's own among them: where the result backend cannot count, it is a message of Celery's that waits until a
    # chord's tasks have ended, and a worker that dies takes it along. ``LOAN_BASE=plain`` shows what the very same tasks do
    # without the queue log; their options then mean nothing.
    task_cls=IdempotentTask if settings.base == "guarded" else PlainTask,
    broker=settings.broker,
    backend=settings.backend,
    include=["example_project.tasks"],
)
app.conf.update(
    # All that celery-idempotent needs to be told.
    idempotent_store=settings.store,
    # Seconds, which keep the demo short; their defaults are 60, 30 and 300. A body whose worker died runs again once its lease
    # has run out, and a message that the broker lost once another one, recorded so much later, has overtaken it.
    idempotent_lease=3,
    idempotent_recovery_interval=1,
    idempotent_lost_after=2,
    # The rest is Celery's.
    task_acks_late=True,
    broker_connection_retry_on_startup=True,
    broker_transport=settings.transport,
    broker_transport_options=settings.transport_options,
    task_default_queue=settings.queue,
    # Result files cannot count, so Celery looks every so many seconds whether a chord's tasks are done.
    result_chord_retry_interval=0.5,
    result_expires=3600,
    # Late acks are only late if the worker does not hoard; no remote control means one queue to look after.
    worker_prefetch_multiplier=1,
    worker_enable_remote_control=False,
    # Seconds from when a pool process is gone until the worker says so of what it ran; 10 by default.
    worker_lost_wait=1,
)
