"""Calls by code that was begun in a block and runs on after it are sent and guarded as without a block."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from sqlalchemy.orm import Session

from celery_idempotent import outbox
from celery_idempotent.core.records import Status
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.producer.box import within
from tests.integration.producer.outbox.conftest import OutboxApp
from tests.support.effects import Effect

#: What runs a function after the block in which it was handed over.
Later = Callable[[Callable[[], Any]], Callable[[], Any]]


def by_a_task_of_the_loop(act: Callable[[], Any]) -> Callable[[], Any]:
    loop = asyncio.new_event_loop()

    async def run() -> Any:
        return act()

    task = loop.create_task(run())

    def finish() -> Any:
        try:
            return loop.run_until_complete(task)
        finally:
            loop.close()

    return finish


def by_a_thread(act: Callable[[], Any]) -> Callable[[], Any]:
    context = contextvars.copy_context()
    answers: list[Any] = []

    def finish() -> Any:
        thread = threading.Thread(target=lambda: answers.append(context.run(act)))
        thread.start()
        thread.join()
        return answers.pop()

    return finish


laters = pytest.mark.parametrize("later", [by_a_task_of_the_loop, by_a_thread])


def batch(session: Session) -> AbstractContextManager[None]:
    return outbox()


blocks = pytest.mark.parametrize("block", [outbox, batch], ids=["of a session", "a batch"])


@laters
@blocks
def test_a_call_after_the_block_is_sent_at_once(outbox_app: OutboxApp, later: Later, block: Any) -> None:
    charge = outbox_app.app.tasks["charge"]
    with outbox_app.session() as session:
        with block(session):
            finish = later(lambda: charge.delay("late"))
        session.rollback()
        result = finish()
        assert outbox_app.published() == ["late"]
        assert not session.in_transaction(), "its session was left alone"

    row = outbox_app.there("charge", "late")
    assert (row.task_id, row.status, result.duplicate) == (result.id, Status.PENDING, False)
    assert row.published_at is not None
    assert charge.delay("late").duplicate is True


@laters
def test_a_call_inside_of_the_block_is_of_the_batch(outbox_app: OutboxApp, later: Later) -> None:
    charge = outbox_app.app.tasks["charge"]
    with outbox():
        result = later(lambda: charge.delay("o-1"))()
        assert (outbox_app.published(), result.duplicate) == ([], None)
    assert outbox_app.published() == ["o-1"]


@laters
def test_a_call_after_an_inner_block_joins_the_outer_one(outbox_app: OutboxApp, later: Later) -> None:
    charge = outbox_app.app.tasks["charge"]
    with outbox_app.session() as session, outbox(session):
        session.add(Effect(name="o-1"))
        with outbox():
            finish = later(lambda: charge.delay("late"))
        finish()
        assert outbox_app.published() == []
        session.commit()
    assert outbox_app.published() == ["late"]


@laters
def test_a_call_after_an_atomic_body_is_sent_at_once(outbox_app: OutboxApp, later: Later) -> None:
    charge = outbox_app.app.tasks["charge"]
    finishes = []

    def body() -> None:
        finishes.append(later(lambda: charge.delay("late")))

    outbox_app.task(body, atomic=True).apply()
    finishes.pop()()
    assert outbox_app.published() == ["late"]


def test_a_thread_that_calls_while_the_batch_ends_is_not_lost(outbox_app: OutboxApp) -> None:
    """It has seen the open block, and comes to its call when that is being sent."""
    charge = outbox_app.app.tasks["charge"]
    between = threading.Event()
    ended = threading.Event()

    class Slow(list[int]):
        """An argument that takes its time to be kept as it is."""

        def __deepcopy__(self, memo: object) -> list[int]:
            between.set()
            assert ended.wait(30)
            return [*self]

    with outbox():
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(charge.delay, "slow", Slow([1])))
        thread.start()
        assert between.wait(30)
        charge.delay("quick")
    ended.set()
    thread.join()
    assert sorted(outbox_app.published()) == ["quick", "slow"]


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_block_that_is_left_in_another_context_says_so(outbox_app: OutboxApp, error: type[Exception] | None) -> None:
    """As by a fixture, or a dependency, whose two halves are run in copies of a context that end with them."""
    with outbox_app.session() as session:
        block = outbox(session)
        contextvars.copy_context().run(block.__enter__)
        outbox_app.app.tasks["charge"].delay("o-1")
        ends = (None, None, None) if error is None else (error, error(), None)
        with pytest.raises(ConfigurationError, match="in another context"):
            block.__exit__(*ends)


def test_blocks_may_end_crosswise(outbox_app: OutboxApp) -> None:
    """Two generators, one begun in the other's block and ended after it."""
    charge = outbox_app.app.tasks["charge"]
    first, second = outbox(), outbox()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    charge.delay("o-1")
    second.__exit__(None, None, None)
    charge.delay("o-2")
    assert outbox_app.published() == ["o-1", "o-2"]
    with within(None), nullcontext():
        charge.delay("o-3")
    assert outbox_app.published() == ["o-3"]
