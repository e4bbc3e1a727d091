"""The transitions between a run's states, and how others are reported."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from celery_idempotent.core.records import Claim, MessageKey
from celery_idempotent.worker.run_state import (
    TRANSITIONS,
    Checkpointed,
    Claimed,
    Finished,
    HandedOn,
    Lost,
    Replayed,
    RunState,
    Unguarded,
    check_transition,
)

CLAIM = Claim(MessageKey("m", "task"), 1)
STATES: list[RunState] = [
    Unguarded(),
    Claimed(CLAIM),
    Replayed(None),
    Checkpointed(CLAIM, None),
    HandedOn(CLAIM),
    Lost(CLAIM),
    Finished(CLAIM),
]
ILLEGAL = [
    (before, after)
    for before, after in itertools.product(STATES, STATES)
    if type(after) not in TRANSITIONS[type(before)]
]


def name(state: object) -> str:
    return type(state).__name__


def test_the_table_has_every_state() -> None:
    assert set(TRANSITIONS) == set(get_args(RunState)) == {type(state) for state in STATES}


@pytest.mark.parametrize("ended", [Replayed, HandedOn, Lost, Finished])
def test_an_ended_run_goes_nowhere(ended: type[RunState]) -> None:
    assert TRANSITIONS[ended] == frozenset()


@pytest.mark.parametrize("before", STATES, ids=name)
def test_listed_transitions_are_not_reported(before: RunState, caplog: pytest.LogCaptureFixture) -> None:
    for after in STATES:
        if type(after) in TRANSITIONS[type(before)]:
            check_transition(before, after, whose="task[m]")
    assert caplog.text == ""


@pytest.mark.parametrize(("before", "after"), ILLEGAL, ids=name)
def test_any_other_step_raises_in_tests(before: RunState, after: RunState) -> None:
    with pytest.raises(AssertionError, match=rf"^task\[m\] goes from {name(before)} to {name(after)},"):
        check_transition(before, after, whose="task[m]")


def test_any_other_step_is_logged_in_a_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CELERY_IDEMPOTENT_STRICT")
    check_transition(Lost(CLAIM), Finished(CLAIM), whose="task[m]")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "CRITICAL",
            "task[m] goes from Lost to Finished, which the table of transitions does not allow: please report this",
        )
    ]
