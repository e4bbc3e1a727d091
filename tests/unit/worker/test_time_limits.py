"""Celery's soft limit strikes a body, and nothing before or after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.pool import soft_timeout_sighandler
from celery.exceptions import SoftTimeLimitExceeded

from celery_idempotent.worker import time_limits
from celery_idempotent.worker.time_limits import TimeLimits


def given(*, is_eager: bool = False, timelimit: Any = None, **settings: Any) -> TimeLimits:
    conf = SimpleNamespace(**{"task_time_limit": None, "task_soft_time_limit": None, **settings})
    task: Any = SimpleNamespace(app=SimpleNamespace(conf=conf), time_limit=None, soft_time_limit=None)
    request: Any = SimpleNamespace(is_eager=is_eager, timelimit=timelimit)
    return TimeLimits(task, request)


def strike() -> str:
    os.kill(os.getpid(), signal.SIGUSR1)
    return "not struck"


@pytest.fixture
def _in_a_child(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a child of prefork, which has billiard's handler."""
    monkeypatch.setattr(time_limits, "_process", time_limits._Process())
    before = signal.signal(signal.SIGUSR1, soft_timeout_sighandler)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("_in_a_child")
class TestInAChild:
    def test_it_strikes_the_body(self) -> None:
        limit = given()
        with pytest.raises(SoftTimeLimitExceeded):
            limit.without(lambda: limit.within(strike))

    def test_it_does_not_strike_what_is_done_without_it(self) -> None:
        limit = given()
        assert limit.without(strike) == "not struck"
        assert limit.struck
        assert limit.spent

    def test_it_does_not_strike_what_follows_the_body(self) -> None:
        limit = given()
        assert limit.without(lambda: (limit.within(lambda: "body"), strike())) == ("body", "not struck")

    def test_it_waits_for_what_the_body_puts_it_off_for(self) -> None:
        limit, done = given(), []

        def body() -> None:
            with pytest.raises(SoftTimeLimitExceeded):
                limit.put_off(lambda: done.append(strike()))
            limit.put_off(lambda: done.append("not struck again"))

        limit.without(lambda: limit.within(body))
        assert done == ["not struck", "not struck again"]

    def test_it_strikes_the_body_after_what_it_was_put_off_for(self) -> None:
        limit = given()
        with pytest.raises(SoftTimeLimitExceeded):
            limit.without(lambda: limit.within(lambda: (limit.put_off(lambda: "kept"), strike())))

    def test_another_run_of_the_body_is_struck_by_what_was_put_off(self) -> None:
        limit = given()
        with pytest.raises(SoftTimeLimitExceeded):
            limit.without(lambda: (strike(), limit.within(lambda: "never")))

    def test_it_strikes_again_afterwards(self) -> None:
        given().without(lambda: None)
        with pytest.raises(SoftTimeLimitExceeded):
            strike()

    def test_an_eager_run_is_part_of_the_outer_body(self) -> None:
        outer, inner = given(), given(is_eager=True)
        with pytest.raises(SoftTimeLimitExceeded):
            outer.without(lambda: outer.within(lambda: inner.without(strike)))


def test_a_process_without_it_keeps_its_signals() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    assert given().without(lambda: "done") == "done"
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(
    ("known", "patience"),
    [
        ({}, float("inf")),
        ({"timelimit": (80.0, None)}, 40.0),
        ({"timelimit": (80.0, 60.0)}, 30.0),
        ({"task_soft_time_limit": 20}, 10.0),
    ],
)
def test_a_message_waits_through_half_of_its_shortest_limit(known: dict[str, Any], patience: float) -> None:
    limit = given(**known)
    assert limit.patience == patience
    assert not limit.spent
