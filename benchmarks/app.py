"""The app of a worker and of a producer, for all but relier, whose app is its own: ``celery -A benchmarks.app worker``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import sqlalchemy as sa
from celery import Task, group

from benchmarks.bare import BehindTheDriver, BetweenTheStatements
from benchmarks.marks import Marks
from benchmarks.subjects import Place, subject_named
from celery_idempotent import IdempotentTask, outbox
from tests.support.effects import Effect

place = Place.of_this_process()
subject = subject_named(place.subject)
app = place.app()
marks = Marks(place.marks)


@app.task(name="noop", ignore_result=True, **subject.options("noop:{number}"))
def noop(number: int) -> None:
    """Nothing; what it returns is not kept."""
    marks.note(number)


@app.task(name="echo", **subject.options("echo:{number}"))
def echo(number: int) -> int:
    """Return a result, which is stored."""
    marks.note(number)
    return number


@app.task(name="keyless", ignore_result=True, **subject.options(None))
def keyless(number: int) -> None:
    """Nothing; this library knows it by its task id, which is what ``base=IdempotentTask`` alone does."""
    marks.note(number)


@app.task(name="bare", base=Task, ignore_result=True)
def bare(number: int) -> None:
    """Nothing, without a guard."""
    marks.note(number)


@app.task(name="between", base=Task, ignore_result=True)
def between(number: int) -> None:
    """Nothing, without a guard, between the statements of one."""
    if statements is None:
        marks.note(number)
    else:
        statements.run(number, marks.note)


statements = None if place.store is None else BetweenTheStatements(place.store, noop, between)

if subject.has_transactions:

    @app.task(name="effect", bind=True, base=Task, ignore_result=True)
    def effect(self: Task, number: int) -> None:
        """Write a row, in a transaction of the body's own, without a guard."""
        with self.app.queue_log.store.engine.begin() as connection:
            connection.execute(sa.insert(Effect).values(name=str(number), value=0))
        marks.note(number)

    @app.task(name="atomic", bind=True, base=IdempotentTask, atomic=True, ignore_result=True)
    def atomic(self: IdempotentTask, number: int) -> None:
        """Write the same row, in one transaction with the message's completion."""
        self.connection.execute(sa.insert(Effect).values(name=str(number), value=0))
        marks.note(number)


# -- ways to publish: given a task's name and the messages' numbers ------------------------------------------------------------


def _single(name: str, numbers: Iterable[int]) -> None:
    task = app.tasks[name]
    for number in numbers:
        task.delay(number)


def _group(name: str, numbers: Iterable[int]) -> None:
    task = app.tasks[name]
    group([task.s(number) for number in numbers]).apply_async()


def _batch(name: str, numbers: Iterable[int]) -> None:
    with outbox():
        _single(name, numbers)


def _group_batch(name: str, numbers: Iterable[int]) -> None:
    with outbox():
        _group(name, numbers)


WAYS: Mapping[str, Callable[[str, Iterable[int]], None]] = {
    "single": _single,
    "group": _group,
    # What the others have for a thousand calls at once is a thousand calls.
    "batch": _batch if subject.guarded else _single,
    "group-batch": _group_batch if subject.guarded else _group,
    "bare": _single if place.store is None else BehindTheDriver(place.store, noop, bare),
    "between": statements or _single,
}
