"""Atomic tasks for real workers, and how they are killed: at a point that a test names.

A file ``<ledger>.die-<point>`` has the first process that comes to the point kill itself. The points are ``body`` (the body has
written, and returns), ``written`` (the completion is in the transaction), ``committed`` (the transaction took effect).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from celery import Celery, Task, chain, signals
from sqlalchemy.orm import Session

from celery_idempotent import IdempotentTask, QueueLog, outbox
from celery_idempotent.core.store import Store
from celery_idempotent.worker.unit_of_work import UnitOfWork
from tests.support import orm
from tests.support.apps.spec import AppSpec
from tests.support.effects import Effect
from tests.support.kill_points import KillPoints
from tests.support.ledger import Ledger
from tests.support.waiting import wait_until

__all__ = ["POINTS", "register", "sell"]

POINTS = ("body", "written", "committed")

#: A setting of the tests' own, for the isolation level of the atomic tasks.
LEVEL = "atomic_isolation_level"


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks ``atomic.*`` and ``told``."""
    assert base is IdempotentTask
    if level := app.conf.get(LEVEL):
        QueueLog(app, isolation_level=level)
    die = _Deaths(ledger)
    late = {"base": base, "bind": True, "atomic": True, "acks_late": True, "reject_on_worker_lost": True}

    @app.task(**late, name="atomic.put")
    def put(self: IdempotentTask, name: str) -> str:
        """Have an effect."""
        with ledger.run(self):
            self.session.add(Effect(name=name))
            self.session.flush()
            die("body")
            return name

    @app.task(**late, name="atomic.order")
    def order(self: IdempotentTask, name: str, queue: str) -> str:
        """Have an effect, by Django's ORM in a process of a Django project, and send a message."""
        with ledger.run(self):
            if orm.is_used():
                from tests.support.orm import models

                models.Effect.objects.create(name=name)
            else:
                self.session.add(Effect(name=name))
            app.tasks["told"].apply_async((f"{name}: sent",), queue=queue)
            return name

    @app.task(**{**late, "atomic": False}, name="plain.order")
    def plain_order(self: Task, name: str, queue: str) -> str:
        """Have an effect that commits by itself, as one elsewhere does, and send a message."""
        engine = sa.create_engine(app.conf.idempotent_store, poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.execute(sa.insert(Effect).values(name=name, value=0))
        app.tasks["told"].apply_async((f"{name}: sent",), queue=queue)
        return name

    @app.task(**late, name="atomic.replaced")
    def replaced(self: IdempotentTask, name: str) -> Any:
        """Have an effect, and be answered by a chain."""
        self.session.add(Effect(name=name))
        return self.replace(chain(app.tasks["told"].s(name), app.tasks["told"].s(" and more"), app=app))

    @app.task(base=base, bind=True, name="told", acks_late=True, reject_on_worker_lost=True)
    def told(self: Task, value: Any, *more: Any) -> Any:
        """Return what waits on a result, or is sent."""
        ledger.note("end", self, detail="".join(map(str, (value, *more))))
        return value

    _that_last(app, late, ledger)
    _that_end_otherwise(app, late, ledger)
    _mortal(ledger)


def _that_last(app: Celery, late: dict[str, Any], ledger: Ledger) -> None:
    @app.task(**late, name="atomic.gated")
    def gated(self: IdempotentTask, name: str, gate: str, write_first: bool = True) -> str:
        """Have an effect, and run until the test makes the file ``gate``; or run, and then have it."""
        with ledger.run(self):
            if write_first:
                self.session.add(Effect(name=name))
                self.session.flush()
            else:
                self.session.scalars(sa.select(Effect.id)).all()  # where the snapshot is fixed, it is from here on
            wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            if not write_first:
                self.session.add(Effect(name=name))
            return name

    @app.task(**late, name="atomic.late")
    def put_late(self: IdempotentTask, name: str, gate: str) -> str:
        """Run until the test makes the file ``gate``, and ask for a transaction only then, to have an effect."""
        with ledger.run(self):
            wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            self.session.add(Effect(name=name))
            self.session.flush()
            return name

    @app.task(**late, name="atomic.lasting")
    def lasting(self: IdempotentTask, name: str, seconds: float) -> str:
        """Read, take some time, and have an effect."""
        with ledger.run(self):
            self.session.scalars(sa.select(Effect.id)).all()
            threading.Event().wait(seconds)
            self.session.add(Effect(name=name))
            return name


def _that_end_otherwise(app: Celery, late: dict[str, Any], ledger: Ledger) -> None:
    @app.task(**late, name="atomic.retry", max_retries=None)
    def retry(self: IdempotentTask, name: str, times: int, throw: bool = True) -> int:
        """Have an effect at each attempt, and retry so many times."""
        with ledger.run(self):
            self.session.add(Effect(name=name))
            self.session.flush()
            if self.request.retries < times:
                self.retry(countdown=0, throw=throw)
            return int(self.request.retries)

    @app.task(**late, name="atomic.pages")
    def pages(self: IdempotentTask, name: str, left: int) -> str:
        """Have an effect for each page, each in a run of its own of the same message."""
        with ledger.run(self):
            self.session.add(Effect(name=f"{name}:{left}"))
            self.session.flush()
            if left:
                return str(self.replace(self.s(name, left - 1)))
            return "the last"

    @app.task(**late, name="atomic.limited", soft_time_limit=1)
    def limited(self: IdempotentTask, name: str) -> None:
        """Have an effect, and run into the soft time limit."""
        with ledger.run(self):
            self.session.add(Effect(name=name))
            self.session.flush()
            threading.Event().wait(100.0)


def _mortal(ledger: Ledger) -> None:
    """Make this process die at the named point, if it becomes a worker."""

    @signals.worker_init.connect(weak=False)
    def arm(**_: Any) -> None:
        _die_at_points(_Deaths(ledger))


def _die_at_points(die: _Deaths) -> None:
    commit = UnitOfWork.commit

    def mortal_commit(self: UnitOfWork, write: Callable[[Store], bool]) -> bool:
        def mortal_write(store: Store) -> bool:
            held = write(store)
            die("written")
            return held

        held = commit(self, mortal_write)
        die("committed")
        return held

    UnitOfWork.commit = mortal_commit  # type: ignore[method-assign]


class _Deaths:
    """Kills the process at a point, once for each file."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __call__(self, point: str) -> None:
        try:
            Path(f"{self._ledger.path}.die-{point}").unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def sell(steps: KillPoints, name: str) -> None:
    """Be a producer: have an effect and send messages, in one transaction of a session. Its steps are those of all that."""
    spec = AppSpec.from_environment(os.environ)
    app = spec.build()
    app.finalize()
    told = app.tasks["told"]
    timeout = {"timeout": 30.0} if spec.store.startswith("sqlite") else {}
    engine = sa.create_engine(spec.store, connect_args=timeout)
    steps.begin()
    with Session(engine) as session, outbox(session):
        session.add(Effect(name=name))
        told.delay(f"{name}: sent")
        chain(told.s(f"{name}: first"), told.s(": second"), app=app).delay()
        session.commit()
    steps.end()
