"""The tasks of a run of chaos, in every variant that is compared: each body notes its key when it starts and when it ends.

An atomic body writes an effect besides, and sends a child: in one transaction with its completion. Elsewhere it does what one can do
there: commit by itself, and then send.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from celery import Celery, Task, chain, chord
from celery.canvas import Signature
from celery.result import AsyncResult

from tests.chaos.effects_db import Effect, EffectsDB
from tests.chaos.plan import TIME_LIMIT, Sending, message_id
from tests.chaos.variants import Variant
from tests.support import orm
from tests.support.apps.scenarios import noted
from tests.support.ledger import Ledger

__all__ = ["ASIDE", "EFFECTS_DB", "GEVENT", "BrokenError", "call_by_name", "register", "signature"]

#: Other queues than the app's own: for calls by name, and for the gevent worker.
ASIDE, GEVENT = "chaos-aside", "chaos-gevent"

#: What else a call by name has. Its body checks all of it, whichever process publishes the message.
_PRIORITY, _TENANT = 7, "acme"

#: Of a task whose message the broker keeps until it is done.
_LATE = {"acks_late": True, "reject_on_worker_lost": True}

_in_context: ContextVar[bool] = ContextVar("in_context", default=False)

#: A setting of the chaos' own: the URL of the database that has the effects, which is the store's if that is one.
EFFECTS_DB = "chaos_effects_db"


class BrokenError(Exception):
    """What the tasks that fail raise."""


class InContext(Task):  # type: ignore[misc]
    """Runs a body in a context, as the mixin of Flask's documentation does."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _in_context.set(True)
        try:
            return self.run(*args, **kwargs)
        finally:
            _in_context.reset(token)


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks; which base they have is the variant's affair."""
    variant = Variant.of_this_process()
    variant.prepare(app)
    late = _LATE
    early = {"acks_late": False}
    effects_db = EffectsDB(app.conf[EFFECTS_DB])

    def task(name: str, **options: Any) -> Any:
        return app.task(bind=True, name=name, **variant.task_options, **options)

    def run(task: Task, key: str, seconds: float) -> str:
        with noted(ledger, task, key):
            time.sleep(seconds)
        return key

    @task("plain", **late)
    def plain(self: Task, key: str, seconds: float) -> str:
        return run(self, key, seconds)

    @task("early", **early, **variant.if_guarded(on_abandoned="rerun"))
    def early_acknowledged(self: Task, key: str, seconds: float) -> str:
        return run(self, key, seconds)

    @task("at_most_once", **early)
    def at_most_once(self: Task, key: str, seconds: float) -> str:
        return run(self, key, seconds)

    @task("retrying", max_retries=None, **late)
    def retrying(self: Task, key: str, seconds: float, retries: int, countdown: float) -> str:
        with noted(ledger, self, key):
            time.sleep(seconds)
            if self.request.retries < retries:
                raise self.retry(countdown=countdown)
        return key

    @task("failing", **late)
    def failing(self: Task, key: str, seconds: float) -> str:
        with noted(ledger, self, key):
            time.sleep(seconds)
            raise BrokenError(key)

    @task("body", **late)
    def body(self: Task, values: list[str], key: str, seconds: float) -> str:
        with noted(ledger, self, key):
            time.sleep(seconds)
            if sorted(values) != [f"{key.removesuffix('.body')}.{place}" for place in range(3)]:
                raise BrokenError(f"{key} was given {values}")
        return key

    @task("child", **late)
    def child(self: Task, key: str, seconds: float) -> str:
        return run(self, key, seconds)

    _register_unusual(app, ledger)
    of_django = orm.is_used()
    if not variant.guarded:
        body_of_atomic = _commit_and_then_call(effects_db, child)
    elif of_django:
        body_of_atomic = _write_by_the_orm(child)
    elif app.conf[EFFECTS_DB] == app.conf.idempotent_store:
        body_of_atomic = _write_by_the_session(child)
    else:
        return  # a worker refuses atomic tasks whose store has no transactions

    @task("atomic", **late, **variant.if_guarded(atomic=True))
    def atomic(self: Any, key: str, seconds: float) -> str:
        with noted(ledger, self, key):
            body_of_atomic(self, key, seconds)
        return key


#: Writes an effect and calls a child; is given the task, its key and how long it takes.
_Body = Callable[[Any, str, float], None]


def _write_by_the_session(child: Any) -> _Body:
    def write(task: Any, key: str, seconds: float) -> None:
        effect = Effect(key=key)
        task.session.add(effect)
        task.session.flush()
        time.sleep(seconds / 2)
        effect.sent = child.delay(f"{key}.child", 0.0).id
        time.sleep(seconds / 2)

    return write


def _write_by_the_orm(child: Any) -> _Body:
    from tests.chaos.orm import models

    def write(task: Any, key: str, seconds: float) -> None:
        effect = models.Effect.objects.create(key=key)
        time.sleep(seconds / 2)
        effect.sent = child.delay(f"{key}.child", 0.0).id
        effect.save()
        time.sleep(seconds / 2)

    return write


def _commit_and_then_call(effects_db: EffectsDB, child: Any) -> _Body:
    def write(task: Any, key: str, seconds: float) -> None:
        with effects_db.session() as session:
            session.add(Effect(key=key))
            session.flush()
            time.sleep(seconds)
            session.commit()
        child.delay(f"{key}.child", 0.0)

    return write


def _register_unusual(app: Celery, ledger: Ledger) -> None:
    """Register the less usual tasks: calls by name, a mixin, revokes, expiries, time limits."""
    options = {**Variant.of_this_process().task_options, **_LATE}

    def task(name: str, **further: Any) -> Any:
        return app.task(bind=True, name=name, **{**options, **further})

    def run(task: Task, key: str, seconds: float) -> str:
        with noted(ledger, task, key):
            time.sleep(seconds)
        return key

    @task("by_name")
    def by_name(self: Task, key: str, seconds: float) -> str:
        with noted(ledger, self, key):
            time.sleep(seconds)
            info = self.request.delivery_info or {}
            found = (info.get("routing_key"), info.get("priority"), self.request.get("tenant"))
            if found != (ASIDE, _PRIORITY, _TENANT):
                raise BrokenError(f"{key} was delivered with {found}")
        return key

    mixed_base = type("Mixed", (InContext, options["base"]), {"abstract": True})

    @task("mixed", base=mixed_base)
    def mixed(self: Task, key: str, seconds: float) -> str:
        with noted(ledger, self, key):
            time.sleep(seconds)
            if not _in_context.get():
                raise BrokenError(f"{key} was run out of its context")
        return key

    @task("revocable")
    def revocable(self: Task, key: str, seconds: float) -> str:
        return run(self, key, seconds)

    @task("expiring")
    def expiring(self: Task, key: str, seconds: float) -> str:
        return run(self, key, seconds)

    @task("limited", time_limit=TIME_LIMIT)
    def limited(self: Task, key: str, seconds: float) -> str:
        return run(self, key, seconds)


def signature(app: Celery, sending: Sending) -> Signature:
    """Return what a sending calls, each step under its message id."""

    def one(key: str, name: str = "plain") -> Signature:
        return app.tasks[name].si(key, sending.seconds).set(message_id=message_id(key))

    keys = [step.key for step in sending.steps()]
    match sending.kind:
        case "chain":
            return chain(*map(one, keys), app=app)
        case "chord":
            body = app.tasks["body"].s(keys[3], sending.seconds).set(message_id=message_id(keys[3]))
            return chord([one(key) for key in keys[:3]], body, app=app)
        case "linked":
            return one(keys[0]).set(link=one(keys[1]))
        case "retrying":
            arguments = (keys[0], sending.seconds, sending.retries, sending.countdown)
            return app.tasks["retrying"].si(*arguments).set(message_id=message_id(keys[0]))
        case "eta":
            return one(keys[0]).set(countdown=sending.countdown)
        case "plain" | "slow" | "outbox":
            return one(sending.key)
        case "expiring":
            return one(keys[0], "expiring").set(expires=sending.countdown)
        case "limited":
            return one(keys[0], "limited").set(queue=GEVENT)
        case named:
            return one(keys[0], named)


def call_by_name(app: Celery, sending: Sending) -> AsyncResult[Any]:
    """Call a sending's task, or the first one of its chain, by its name, with all that ``send_task`` takes."""
    step = sending.steps()[0].key
    name = {"plain": "plain", "slow": "plain", "chain": "plain"}.get(sending.kind, sending.kind)
    args: tuple[Any, ...] = (step, sending.seconds)
    if sending.kind == "retrying":
        args = (*args, sending.retries, sending.countdown)
    return app.send_task(
        name,
        args,
        message_id=message_id(step),
        queue=ASIDE,
        priority=_PRIORITY,
        headers={"tenant": _TENANT},
    )
